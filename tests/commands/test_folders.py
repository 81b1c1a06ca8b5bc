"""Real folders as people have them, without labels, with nothing said but the folder and a length."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoforge.cli.main import main

QUICK = (
    "train.steps=4 train.batch_size_per_gpu=8 student.embed_dim=48 student.depth=2 student.num_heads=2 "
    "crops.global_crops_size=48 crops.local_crops_size=24 dino.head_n_prototypes=64 log.every_steps=1 train.threads=1"
).split()


def train(folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, float]]:
    assert main(["train", str(folder), "--out", str(out), *QUICK]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["finished"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert np.isfinite([line["total"] for line in lines]).all()
    return capsys.readouterr().out, summary


@pytest.mark.processes
def test_huge_photographs(require_system, tmp_path, capsys):
    folder = require_system("/usr/share/wallpapers", "plasma-workspace-wallpapers")
    out, summary = train(folder, tmp_path / "run", capsys)
    assert "5120" in out
    assert summary["skipped_images"] == 0


@pytest.mark.processes
def test_grey_clothes(require_system, tmp_path, capsys):
    packed = require_system("/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz", "dataset-fashion-mnist")
    pixels = np.frombuffer(gzip.decompress(packed.read_bytes()), dtype=np.uint8, offset=16).reshape(-1, 28, 28)
    folder = tmp_path / "images"
    for i, image in enumerate(pixels[:64]):
        path = folder / str(i % 4) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    out, summary = train(folder, tmp_path / "run", capsys)
    assert "28×28 pixels, L" in out
    assert summary["skipped_images"] == 0


@pytest.mark.processes
def test_one_folder_of_everything(solar_cells, tmp_path, capsys):
    """16-bit, RGBA, CMYK, palette, rotated, several formats and depths of folders; and a text file among them."""
    folder = tmp_path / "images"
    (folder / "a" / "b").mkdir(parents=True)
    files = sorted(solar_cells.iterdir())[:24]
    for i, path in enumerate(files):
        grey = Image.open(path)
        deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        rotated = Image.Exif()
        rotated[0x0112] = 6
        match i % 8:
            case 0:
                deep.save(folder / f"{i}.png")
            case 1:
                deep.save(folder / "a" / f"{i}.tiff")
            case 2:
                grey.convert("RGBA").save(folder / "a" / "b" / f"{i}.png")
            case 3:
                grey.convert("CMYK").save(folder / f"{i}.JPG")
            case 4:
                grey.convert("P").save(folder / f"{i}.gif")
            case 5:
                grey.save(folder / f"{i}.jpeg", exif=rotated)
            case 6:
                grey.convert("RGB").save(folder / f"{i}.webp")
            case 7:
                shutil.copy(path, folder / "a" / f"{i}.bmp")  # a PNG by content
    (folder / "notes.txt").write_text("not an image")
    out, summary = train(folder, tmp_path / "run", capsys)
    assert "24 images" in out
    for mode in ("I;16", "RGBA", "CMYK", "P", "RGB", "L"):
        assert mode in out
    assert summary["skipped_images"] == 0
