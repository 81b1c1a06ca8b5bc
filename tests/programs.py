"""What Python programs need that tests start."""

import os
from pathlib import Path


def environment(*folders: Path) -> dict[str, str]:
    """This process's environment, in which a program imports from ``tests/`` as tests do, and from further folders."""
    paths = [*map(str, folders), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
