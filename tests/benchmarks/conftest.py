"""The benchmark that a file of tests is about, and the mark of these tests."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark(request: pytest.FixtureRequest) -> ModuleType:
    """``benchmarks/step.py`` as a module for ``test_step.py``, and so on; its folder is on no path."""
    name = request.path.stem.removeprefix("test_")
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("slow")
