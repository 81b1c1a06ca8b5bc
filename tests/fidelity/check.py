"""Compares training steps with numbers measured on the reference implementation.

    python tests/fidelity/check.py DIR…

Each directory is a case: initial weights, batches, and the losses, gradients and final weights that the reference
gave (``src/dinoforge/selfcheck/cases/README.md`` says how they were made). The steps run through the code that training
uses. Prints the worst error of each kind and where it is; exits with 1 beyond the bounds or where a case cannot be run,
with 2 if one is missing.
"""

import argparse
import sys
from pathlib import Path

from dinoforge.selfcheck.fidelity import BOUNDS, CASES, HALF_BOUNDS, HALF_LEAST, Errors, check, run_case

__all__ = ["BOUNDS", "CASES", "HALF_BOUNDS", "HALF_LEAST", "Errors", "check", "main", "run_case"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", type=Path, metavar="DIR", help="a directory with a case.json")
    cases: list[Path] = parser.parse_args(arguments).cases
    if missing := [str(folder) for folder in cases if not (folder / "case.json").is_file()]:
        print(f"no case.json in {', '.join(missing)}", file=sys.stderr)
        return 2
    passed = True
    for folder in cases:
        try:
            errors = check(folder)
        except Exception as error:  # the other cases are still to be checked
            print(f"FAIL {folder.name}: {type(error).__name__}: {error}")
            passed = False
            continue
        passed &= errors.within_bounds
        print(f"{'ok  ' if errors.within_bounds else 'FAIL'} {folder.name}: worst error as a share of its bound")
        for kind, (ratio, where) in errors.worst.items():
            print(f"       {kind:<14} {ratio:8.4f}  {where}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
