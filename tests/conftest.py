"""What every test may use: real images, system packages, and the rule that CI skips nothing."""

import csv
import importlib.util
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# Set in CI, where everything a test needs can be installed: a skipped test is then a failed one.
REQUIRE_ALL = os.environ.get("DINOFORGE_REQUIRE_ALL") == "1"

# The same examples on every machine and in every run, however slow it is.
settings.register_profile("dinoforge", derandomize=True, deadline=None)
settings.load_profile("dinoforge")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Networks in tests are so small that a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def require_system() -> Callable[[str | Path, str], Path]:
    """``require_system(path, package)``: the path; the test is skipped, naming the package, where it does not exist."""

    def require(path: str | Path, package: str) -> Path:
        if not Path(path).exists():
            pytest.skip(f"needs {path} of the Debian package {package}")
        return Path(path)

    return require


@pytest.fixture(scope="session")
def browser(require_system: Callable[[str | Path, str], Path]) -> Generator[Any, None, None]:
    """Debian's Chromium, one for all: a second Playwright cannot begin while there is a first."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    path = require_system("/usr/bin/chromium", "chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(path), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def solar_cells() -> Path:
    """2,624 grey photographs of solar cells, 300 x 300, as the files of the elpv-dataset package."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        pytest.skip("needs the Python package elpv-dataset")
    return Path(spec.origin).parent / "data" / "images"


@pytest.fixture(scope="session")
def solar_labels(solar_cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labels file for ``solar_cells``: ``defect`` where the experts' probability is at least 0.5, else ``fine``."""
    lines = (solar_cells.parent / "labels.csv").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines]  # images/cell0001.png  1.0  mono
    path = tmp_path_factory.mktemp("labels") / "solar.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "label"])
        writer.writerows([Path(name).name, "defect" if float(p) >= 0.5 else "fine"] for name, p, _ in rows)
    return path


@pytest.fixture(scope="session")
def classes(solar_cells: Path, solar_labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders, one for each label, of 20 solar cells each."""
    root = tmp_path_factory.mktemp("classes")
    labels = dict(line.split(",") for line in solar_labels.read_text().splitlines()[1:])
    for label in ("defect", "fine"):
        (root / label).mkdir()
        for name in [name for name, value in labels.items() if value == label][:20]:
            shutil.copy(solar_cells / name, root / label)
    return root


@pytest.fixture
def flat_classes(classes: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The images of ``classes`` in one folder, and a labels file for them."""
    flat = tmp_path / "flat"
    flat.mkdir()
    rows = []
    for path in sorted(classes.rglob("*.png")):
        shutil.copy(path, flat)
        rows.append(f"{path.name},{path.parent.name}")
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(rows))
    return flat, labels


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what needs a browser."""
    if "browser" in getattr(item, "fixturenames", ()):
        item.add_marker("browser")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes by their number: those of an archive hold the time at which it was made, and two workers then disagree
    about the names of the tests."""
    return f"{len(val)}_bytes" if isinstance(val, bytes) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    # An expected failure is reported as skipped, too, but it did run.
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        if "not permitted here" in str(reason):
            return  # nothing that could be installed would change that; it is named all the same
        report.outcome = "failed"
        report.longrepr = f"{reason} (DINOFORGE_REQUIRE_ALL=1: no test may be skipped)"
