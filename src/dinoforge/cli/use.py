"""Parsers of the commands that use a backbone: export, embed and eval."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from dinoforge.cli.keys import Commands, add_keys, parse_keys, print_help, whole_number_from

if TYPE_CHECKING:
    from dinoforge.features.extract import Skipped


def add_export(commands: Commands) -> None:
    export = commands.add_parser(
        "export",
        help="write a backbone for another library, and compare its outputs there with ours",
        description="Writes a backbone for another library, runs it there, and prints the largest difference from our "
        "outputs. Nothing is written if they differ.",
        epilog="example: dinoforge export runs/photos --to hf --out photos-backbone",
    )
    export.add_argument("model", metavar="RUN|FILE", help="run directory or weights file")
    export.add_argument("--to", required=True, choices=("safetensors", "official", "timm", "hf", "onnx"))
    export.add_argument("--out", required=True, metavar="PATH", help="file, or folder for hf; must not be there yet")
    export.add_argument(
        "--size", type=whole_number_from(1), nargs="+", metavar="PIXELS", help="side, or height and width"
    )
    export.add_argument("--bake", action="store_true", help="make position embeddings for --size alone")
    add_keys(export, "what a foreign file cannot say, such as student.num_heads=6")
    export.set_defaults(run=_export, parser=export)


def _export(options: argparse.Namespace) -> int:
    if options.size and len(options.size) > 2:
        options.parser.error("--size takes a side, or height and width")
    keys = parse_keys(options.keys)
    from dinoforge.commands.export import export
    from dinoforge.export.make import exported_in_words

    size = (options.size[0], options.size[-1]) if options.size else None
    print(exported_in_words(export(options.model, options.to, options.out, size=size, bake=options.bake, **keys)))
    return 0


def add_embed(commands: Commands) -> None:
    embed = commands.add_parser(
        "embed",
        help="write the features of a folder of images to a file",
        description="Writes the name and the cls token of every image, in the order of the names. The same command "
        "again continues after an interruption. An image that cannot be read gets no row and is listed in "
        "….skipped.txt.",
        epilog="example: dinoforge embed runs/photos photos/ --out features.parquet",
    )
    embed.add_argument("model", metavar="RUN|FILE", help="run directory or weights file")
    embed.add_argument("data", metavar="DATA", help="folder of images, walked recursively")
    embed.add_argument("--out", required=True, metavar="FILE", help="….parquet, or ….npy with ….names.txt")
    embed.add_argument("--patches", action="store_true", help="the patch tokens, too")
    add_keys(embed, "eval.size=N, eval.crop=true, device=cpu, precision=fp32, student.num_heads=N")
    embed.set_defaults(run=_embed, parser=embed)


def _embed(options: argparse.Namespace) -> int:
    keys = parse_keys(options.keys)
    from dinoforge.commands.embed import write_features
    from dinoforge.features.table import Progress, embedded_in_words

    with Progress() as progress:
        result = write_features(
            options.model, options.data, options.out, patches=options.patches, on_progress=progress, **keys
        )
    print(embedded_in_words(result))
    return 0


def add_evaluate(commands: Commands) -> None:
    evaluate = commands.add_parser("eval", help="measure a backbone on labelled images")
    evaluate.set_defaults(run=partial(print_help, evaluate), parser=evaluate)
    methods = evaluate.add_subparsers(metavar="METHOD")
    for name, what in (
        ("knn", "weighted k-NN"),
        ("linear", "linear classifiers by SGD over a grid of learning rates and layers"),
        ("logreg", "logistic regression by scikit-learn"),
    ):
        method = methods.add_parser(
            name,
            help=f"{what} on frozen features",
            description=f"{what[0].upper()}{what[1:]} on frozen features, beside raw pixels and the untrained network.",
        )
        method.add_argument("model", metavar="RUN|FILE", help="run directory or weights file")
        method.add_argument("--data", required=True, metavar="DIR", help="labelled images")
        method.add_argument(
            "--test", metavar="DIR", help="images to test on; default: five stratified 80/20 splits of --data"
        )
        method.add_argument("--labels", metavar="FILE.csv", help="file name, label; default: names of sub-folders")
        method.add_argument(
            "--shots",
            type=whole_number_from(2),
            metavar="N",
            help="at most N labelled images of each class; default: all",
        )
        method.add_argument("--json", action="store_true", help="print one line of JSON")
        add_keys(method, "eval.size=N, eval.crop=true, device=cpu, precision=fp32, student.num_heads=N")
        method.set_defaults(run=_eval_knn if name == "knn" else _eval_classifier, method=name, parser=method)


def _eval_knn(options: argparse.Namespace) -> int:
    keys = parse_keys(options.keys)
    from dinoforge.commands.evaluate import evaluate_knn
    from dinoforge.evaluation.knn import knn_table

    given = {"test": options.test, "labels": options.labels, "shots": options.shots}
    result, skipped = evaluate_knn(options.model, options.data, **given, **keys)
    _print_evaluation(json.dumps(result) if options.json else knn_table(result), skipped)
    return 0


def _eval_classifier(options: argparse.Namespace) -> int:
    keys = parse_keys(options.keys)
    from dinoforge.commands.evaluate import evaluate_classifier
    from dinoforge.evaluation.classifiers import classifier_table

    given = {"test": options.test, "labels": options.labels, "shots": options.shots}
    result, skipped = evaluate_classifier(options.method, options.model, options.data, **given, **keys)
    _print_evaluation(json.dumps(result) if options.json else classifier_table(result), skipped)
    return 0


def _print_evaluation(text: str, skipped: "Sequence[Skipped]") -> None:
    for image in skipped:
        print(f"skipped  {image.name}: {image.reason}", file=sys.stderr)
    print(text)
