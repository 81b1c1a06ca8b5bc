"""The command line; it imports nothing heavy before it knows that there is work."""

import argparse
import difflib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from dinoforge.cli.keys import EXIT_CRASH, is_rank, print_help
from dinoforge.cli.look import (
    add_bench,
    add_compare,
    add_doctor,
    add_explain,
    add_inspect,
    add_plan,
    add_replay,
    add_report,
    add_selfcheck,
)
from dinoforge.cli.train import add_submit, add_train
from dinoforge.cli.use import add_embed, add_evaluate, add_export
from dinoforge.errors import DinoforgeError, has_launcher, is_of_one_rank, record_failure
from dinoforge.system.signals import EXIT_SIGNALS
from dinoforge.system.terminal import be_patient, leave
from dinoforge.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    0 done; 1 doctor found something, or a data worker died; 2 a user's error; 3 out of memory; 4 another rank is gone;
    129, 130, 138, 140 or 143 stopped by a signal.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    takes_keys = hasattr(options, "keys")
    for text in rest:
        if text.startswith("-") or "=" not in text or not takes_keys:
            options.parser.error(_unrecognized(text, options.parser, takes_keys=takes_keys))
    if takes_keys:
        options.keys = [*options.keys, *rest]
    _require_values(options)
    try:
        return int(options.run(options))
    except DinoforgeError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_SIGNALS["SIGINT"]


def _unrecognized(text: str, parser: argparse.ArgumentParser, *, takes_keys: bool) -> str:
    """The error for an argument that no option takes, with the option that is nearest to it."""
    expected = "an option of this command" + (" or key=value" if takes_keys else "")
    name = text.partition("=")[0]
    options = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.7)
    if not near and takes_keys:
        from dinoforge.recipe.load import nearest_keys

        near = [f"{key}=VALUE" for key in nearest_keys(name.lstrip("-").replace("-", "_"))]
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"unrecognized argument {text!r}{hint}: expected {expected}"


def _require_values(options: argparse.Namespace) -> None:
    """Refuse empty arguments, as when a shell's variable is not set; expand ~, which shells leave in --out=~/run."""
    named = {action.dest: action for action in options.parser._actions}
    for dest, value in vars(options).items():
        several = value if isinstance(value, list) else [value]
        if dest in named and any(isinstance(text, str) and not text.strip() for text in several):
            action = named[dest]
            what = action.option_strings[-1] if action.option_strings else str(action.metavar or dest)
            options.parser.error(f"{what} is empty, as when a variable of the shell is not set: give a value")
        if dest in named and dest != "keys" and isinstance(value, str | list):
            expanded = [os.path.expanduser(text) if isinstance(text, str) else text for text in several]
            setattr(options, dest, expanded if isinstance(value, list) else expanded[0])


def _print_error(error: DinoforgeError) -> None:
    """Prints an error that all ranks have once, and one that perhaps only this rank has; or has the launcher do it."""
    record_failure(error)
    if has_launcher():
        return
    rank = os.environ.get("RANK", "").strip() or "0" if is_rank() else "0"
    if rank == "0":
        print(f"error: {error}", file=sys.stderr)
    elif is_of_one_rank(error):
        print(f"error on rank {rank}: {error}", file=sys.stderr)


def run() -> NoReturn:
    """The program ``dinoforge``."""
    be_patient()
    if not is_rank() and not has_launcher():
        code = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done: an end in peace, without a traceback of its own
        sys.exit(code)
    try:
        code = main()
    except Exception as error:
        record_failure(error)
        print(f"rank {os.environ.get('RANK', '0')}:", file=sys.stderr)
        traceback.print_exc()
        code = EXIT_CRASH
    # What libraries do while the interpreter shuts down may wait for ranks that will never come, and gloo's threads,
    # which outlive the process group, may abort the process.
    leave(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinoforge", description="Pretrain vision transformers on your own images, without labels, by DINOv2."
    )
    parser.add_argument("--version", action="version", version=f"dinoforge {__version__}")
    parser.set_defaults(run=partial(print_help, parser), parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND")

    for add in (
        add_train,
        add_inspect,
        add_submit,
        add_replay,
        add_bench,
        add_explain,
        add_plan,
        add_compare,
        add_doctor,
        add_report,
        add_selfcheck,
        add_export,
        add_embed,
        add_evaluate,
    ):
        add(commands)
    return parser


if __name__ == "__main__":
    run()
