"""The command line. Imports nothing heavy before it knows that there is work."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from dinoforge import __version__
from dinoforge.errors import DinoforgeError

_EXIT_USER_ERROR = 2
_EXIT_SIGNALS = {"SIGINT": 130, "SIGTERM": 143}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 a user's error, 130 or 143 stopped by a signal."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    for text in rest:
        if text.startswith("-") or "=" not in text:
            options.parser.error(f"unrecognized argument {text!r}: expected an option of this command or key=value")
    if hasattr(options, "keys"):
        options.keys = [*options.keys, *rest]
    elif rest:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(options.run(options))
    except DinoforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_USER_ERROR
    except KeyboardInterrupt:
        return _EXIT_SIGNALS["SIGINT"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinoforge", description="Pretrain vision transformers on your own images, without labels, by DINOv2."
    )
    parser.add_argument("--version", action="version", version=f"dinoforge {__version__}")
    parser.set_defaults(run=partial(_help, parser), parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="pretrain a backbone on a folder of images",
        description="Pretrain a backbone on a folder of images. The same command again continues a run that was "
        "stopped.",
        epilog="example: dinoforge train photos/ --out runs/photos train.steps=2000",
    )
    train.add_argument("data", metavar="DATA", help="folder of images, walked recursively")
    train.add_argument("--recipe", default="small", metavar="NAME|FILE", help="default: small; see docs/recipes.md")
    train.add_argument("--out", metavar="RUN", help="run directory; default: runs/FOLDER-RECIPE")
    train.add_argument("--dry-run", action="store_true", help="say what would run, and write nothing")
    _add_keys(train, "recipe keys, such as train.steps=2000")
    train.set_defaults(run=_train, parser=train)

    evaluate = commands.add_parser("eval", help="measure a backbone on labelled images")
    evaluate.set_defaults(run=partial(_help, evaluate), parser=evaluate)
    methods = evaluate.add_subparsers(metavar="METHOD")
    knn = methods.add_parser(
        "knn",
        help="weighted k-NN on frozen features",
        description="Weighted k-NN on frozen features, beside raw pixels and the untrained network.",
    )
    knn.add_argument("model", metavar="RUN|FILE", help="run directory or weights file")
    knn.add_argument("--data", required=True, metavar="DIR", help="labelled images")
    knn.add_argument("--test", metavar="DIR", help="images to test on; default: five stratified 80/20 splits of --data")
    knn.add_argument("--labels", metavar="FILE.csv", help="file name, label; default: names of sub-folders")
    knn.add_argument("--json", action="store_true", help="print one line of JSON")
    _add_keys(knn, "eval.size=N, eval.crop=true")
    knn.set_defaults(run=_eval_knn, parser=knn)
    return parser


def _help(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    parser.print_help()
    return 0


def _add_keys(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("keys", nargs="*", metavar="key=value", help=text)


def _keys(texts: Sequence[str]) -> dict[str, Any]:
    from dinoforge.config import parse_override

    return dict(parse_override(text) for text in texts)


def _train(options: argparse.Namespace) -> int:
    from dinoforge.config import load_recipe

    keys = _keys(options.keys)
    load_recipe(options.recipe, keys)  # a mistyped key is answered before torch is imported

    from dinoforge.api import train

    result = train(options.data, options.recipe, options.out, dry_run=options.dry_run, **keys)
    return _EXIT_SIGNALS.get(result.stopped_by or "", 0)


def _eval_knn(options: argparse.Namespace) -> int:
    keys = _keys(options.keys)
    from dinoforge.api import evaluate_knn
    from dinoforge.evaluation.knn import render

    result, skipped = evaluate_knn(options.model, options.data, test=options.test, labels=options.labels, **keys)
    for image in skipped:
        print(f"skipped  {image.name}: {image.reason}", file=sys.stderr)
    print(json.dumps(result) if options.json else render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
