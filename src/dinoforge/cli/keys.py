"""Recipe keys, types of arguments and exit codes, for all parsers."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

EXIT_FINDINGS = 1
EXIT_CRASH = 1


def whole_number_from(least: int) -> Callable[[str], int]:
    """Make a type of arguments: whole numbers of at least ``least``."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return number


def number_above_zero(text: str) -> float:
    """A type of arguments: finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def is_rank() -> bool:
    """Whether torchrun or another launcher started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "").strip() not in ("", "1")


def print_help(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    parser.print_help()
    return 0


def add_keys(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("keys", nargs="*", metavar="key=value", help=text)


def parse_keys(texts: Sequence[str]) -> dict[str, Any]:
    from dinoforge.recipe.load import parse_override

    return dict(parse_override(text) for text in texts)


def check_recipe(recipe: str, keys: Mapping[str, Any]) -> None:
    """Raise the errors of a recipe that show without the images."""
    from dinoforge.recipe.load import converted, load_recipe

    if recipe == "auto":
        converted(keys)
    else:
        load_recipe(recipe, keys)


def say_ignored(ignored: Mapping[str, str]) -> None:
    if ignored:
        print(f"ignored  {'; '.join(f'{key}: {reason}' for key, reason in ignored.items())}", file=sys.stderr)
