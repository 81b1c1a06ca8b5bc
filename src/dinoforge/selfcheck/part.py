"""One part of a self-check, in a process of its own: a crash or a hang in it is a line, not the end of the check.

    python -m dinoforge.selfcheck.part NAME SETTINGS

Prints a line of JSON for each finding. Whatever else comes to its output is not a finding.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator

from dinoforge.selfcheck.lines import Line, all_guarded
from dinoforge.selfcheck.settings import Settings

PREFIX = "selfcheck line: "
PARTS: dict[str, float] = {
    "environment": 120,
    "steps": 300,
    "journey": 900,
    "waiting": 180,
    "placement": 300,
    "ranks": 900,
    "memory": 300,
    "speed": 400,
}
"""The parts in their order: modules of this package, and so many seconds each may take."""


def lines_of(name: str, settings: Settings) -> Iterator[Line]:
    """The findings of a part, each with the time that it took."""

    def look() -> Iterator[Line]:
        check: Callable[[Settings], Iterator[Line]] = importlib.import_module(f"dinoforge.selfcheck.{name}").check
        return check(settings)

    since = time.monotonic()
    for line in all_guarded(name, look):
        yield line.after(time.monotonic() - since)
        since = time.monotonic()


def main() -> None:
    name, settings = sys.argv[1], Settings.from_json(json.loads(sys.argv[2]))
    for line in lines_of(name, settings):
        print(f"\n{PREFIX}{json.dumps(line.as_json())}", flush=True)


def command(name: str, settings: Settings) -> list[str]:
    """The module and arguments that run a part."""
    return ["dinoforge.selfcheck.part", name, json.dumps(settings.as_json())]


def read(output: str) -> list[Line]:
    """The findings in the output of a part; a line that is still being printed is left out."""
    whole = output[: output.rfind("\n") + 1].splitlines()
    return [Line.from_json(json.loads(row.removeprefix(PREFIX))) for row in whole if row.startswith(PREFIX)]


def other_output(output: str) -> str:
    """The output of a part apart from its findings."""
    return "\n".join(row for row in output.splitlines() if not row.startswith(PREFIX))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of a library that hang would be waited for
