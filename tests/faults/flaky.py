"""The command line on storage that fails now and then: about one read in twenty, at the first try."""

import errno
import random
import sys
from pathlib import Path

from dinoforge.cli.main import run

read_bytes = Path.read_bytes
chance = random.Random(int(sys.argv.pop(1)))
failed: set[Path] = set()


def flaky(path: Path) -> bytes:
    if path.suffix == ".png" and path not in failed and chance.random() < 0.05:
        failed.add(path)
        raise OSError(errno.EIO, "Input/output error")
    failed.discard(path)
    return read_bytes(path)


Path.read_bytes = flaky  # type: ignore[method-assign]
run()
