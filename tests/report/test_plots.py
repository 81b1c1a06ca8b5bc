"""Figures as Python functions on a run, and as files."""

import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dinoforge.cli.main import main
from dinoforge.commands.report import open_run, report
from dinoforge.errors import DataError, DinoforgeError
from dinoforge.report import plots
from dinoforge.report.charts import curve

pytest.importorskip("matplotlib", reason="needs the Python package matplotlib")
LACKING = {"probes"}  # such metrics the run has not


@pytest.fixture(scope="module")
def opened(run):
    return open_run(run)


@pytest.mark.slow
def test_the_command_writes_each_as_png_and_svg_and_says_what_it_left_out(run, tmp_path, capsys) -> None:
    assert main(["report", str(run), "--figures", str(tmp_path / "new")]) == 0
    said = capsys.readouterr()
    names = plots.FIGURES.keys() - LACKING
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    assert len(said.out.splitlines()) == 1 + len(files)
    assert {line.split()[2].rstrip(":") for line in said.err.splitlines()} == LACKING
    for name in names:
        with Image.open(tmp_path / "new" / f"{name}.png") as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 10  # something is drawn
        assert ElementTree.parse(tmp_path / "new" / f"{name}.svg").getroot().tag.endswith("svg")


def test_curves_show_the_metrics(opened) -> None:
    (axes,) = [a for a in plots.losses(opened, smooth=False).axes if a.get_title(loc="left") == "Loss"]
    steps, values = curve(opened.metrics, "total")
    assert axes.lines[0].get_xdata().tolist() == steps
    assert axes.lines[0].get_ydata().tolist() == values


def test_the_similarity_map_is_brightest_at_its_patch(opened) -> None:
    figure = plots.similarity(opened, image=1, row=2, column=3)
    count = len(opened.learned.maps)
    shown = figure.axes[count + 1].images[0].get_array()
    assert np.unravel_index(shown.argmax(), shown.shape) == (2, 3)
    assert shown.max() == pytest.approx(1, abs=1e-5)
    with pytest.raises(DataError, match="image 9: expected 0 to 5"):
        plots.similarity(opened, image=9)
    with pytest.raises(DataError, match="patches"):
        plots.similarity(opened, row=99)


def test_crops_show_what_the_network_saw(opened) -> None:
    figure = plots.crops(opened)
    seen, count = opened.seen[0], len(opened.seen[0].before)
    for j in range(count):
        assert np.array_equal(figure.axes[j].images[0].get_array(), seen.before[j].permute(1, 2, 0))
        assert np.array_equal(figure.axes[count + j].images[0].get_array(), seen.after[j].permute(1, 2, 0))
    cover = figure.axes[count].images[1].get_array()[..., 3]
    assert cover.mean() == pytest.approx(0.88 * seen.masks[0].float().mean())


def test_without_matplotlib_it_says_what_to_install(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DinoforgeError, match=r"pip install 'dinoforge\[plot\]'"):
        report(run, figures=tmp_path)
