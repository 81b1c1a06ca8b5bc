"""What the repository promises about itself."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dinoforge

ROOT = Path(__file__).parents[1]


@pytest.mark.processes
def test_import_is_light() -> None:
    """A mistyped command is answered at once: torch is imported where it is used."""
    code = "import sys, dinoforge; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "torchvision", "numpy", "PIL"} & set(modules)


@pytest.mark.processes
def test_import_changes_nothing() -> None:
    """No output, and neither the number of threads nor the random state is touched."""
    code = (
        "import torch; state = lambda: (torch.get_num_threads(), torch.get_rng_state().tolist()); before = state();"
        "import dinoforge.commands.train; assert state() == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_version_stands_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert dinoforge.__version__ == project["version"]
    assert f"\n## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
