"""A folder with one of each kind of trouble, and what the command says of it."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from dinoforge.cli.main import main


def run(*arguments: str | Path) -> tuple[int, str]:
    """Exit code of the command and what it prints."""
    out = StringIO()
    with redirect_stdout(out):
        code = main(["inspect", *map(str, arguments)])
    return code, out.getvalue()


@pytest.fixture(scope="session")
def inspect():
    """``inspect(*arguments)``: exit code and printed text."""
    return run


@pytest.fixture(scope="session")
def troubled(tmp_path_factory):
    from . import troubled

    return troubled.make(tmp_path_factory.mktemp("data") / "troubled")


@pytest.fixture(scope="session")
def told(troubled, tmp_path_factory):
    """What is said of the troubled folder as text, as JSON, and as a page."""
    path = tmp_path_factory.mktemp("page") / "troubled.html"
    code, text = run(troubled, "--report", path)
    assert code == 0
    code, line = run(troubled, "--json")
    assert code == 0
    return SimpleNamespace(text=text, json=json.loads(line), page=path)
