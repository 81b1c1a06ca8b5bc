"""Image files that are damaged, lie, or are not there any more: skipped, each named once, in bounded memory."""

import io
import os
import random
import resource
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dinoforge
from dinoforge.commands.bench import bench
from dinoforge.commands.export import export
from dinoforge.commands.run import _listed
from dinoforge.data.bad_images import BadImages, BadImagesError
from dinoforge.data.batches import TrainingData, make_loader
from dinoforge.data.crops import MultiCrop
from dinoforge.data.decode import decode
from dinoforge.data.sources import open_source
from dinoforge.errors import DataError, ImageError
from dinoforge.runs import directory
from dinoforge.system import distributed
from programs import environment

MAX_PIXELS = 2**20
SIZES = {
    "student.embed_dim": 32,
    "student.depth": 1,
    "student.num_heads": 2,
    "student.patch_size": 8,
    "crops.global_crops_size": 16,
    "crops.local_crops_size": 8,
    "crops.local_crops_number": 2,
    "augment.blur_kernel": 3,
    "dino.head_n_prototypes": 32,
    "dino.head_hidden_dim": 32,
    "dino.head_bottleneck_dim": 8,
    "train.batch_size_per_gpu": 4,
    "train.steps": 16,
    "train.threads": 1,
    "log.every_steps": 1,
    "precision": "fp32",
}


def encoded(format, frames=1):
    generator = np.random.default_rng(len(format) + frames)
    images = [
        Image.fromarray(generator.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize((44, 36)) for _ in range(frames)
    ]
    if format == "GIF":
        images = [image.quantize(64) for image in images]
    stream = io.BytesIO()
    more = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(stream, format, **more)
    return stream.getvalue()


SOUND = {
    "jpg": encoded("JPEG"),
    "png": encoded("PNG"),
    "webp": encoded("WEBP"),
    "tif": encoded("TIFF"),
    "bmp": encoded("BMP"),
    "gif": encoded("GIF"),
    "moving.gif": encoded("GIF", frames=3),
    "moving.webp": encoded("WEBP", frames=3),
    "pages.tif": encoded("TIFF", frames=3),
}
# Where a file says how large it is: place of the width, format of both numbers.
SIZE_AT = {
    "jpg": (SOUND["jpg"].index(b"\xff\xc0") + 5, ">HH"),
    "png": (16, ">II"),
    "bmp": (18, "<ii"),
    "gif": (6, "<HH"),
}


def mutations(number):
    """File names and contents: flipped bits, truncations, headers that lie, empty files, wrong names."""
    chance = random.Random(0)
    names = sorted(SOUND)
    for index in range(number):
        name = names[index % len(names)]
        data = bytearray(SOUND[name])
        kind = ("flip", "flips", "cut", "header", "lie", "empty", "renamed", "tail")[index // len(names) % 8]
        if kind == "flip":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif kind == "flips":
            for _ in range(20):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            data = data[: chance.randrange(len(data))]
        elif kind == "header":
            for _ in range(3):
                data[chance.randrange(min(len(data), 64))] = chance.randrange(256)
        elif kind == "lie" and name in SIZE_AT:
            place, form = SIZE_AT[name]
            largest = 60_000 if form.endswith("HH") else 2_000_000_000
            struct.pack_into(form, data, place, *(chance.randrange(largest) for _ in range(2)))
        elif kind == "lie":
            data[8:16] = chance.randbytes(8)
        elif kind == "empty":
            data = data[: chance.randrange(2)]
        elif kind == "renamed":
            name = f"{name}.{chance.choice(['jpg', 'png', 'tif', 'bmp'])}"
        else:
            data[len(data) // 2 :] = chance.randbytes(len(data) - len(data) // 2)
        yield f"mutant{index:04d}.{kind}.{name}", bytes(data)


def refused(data):
    try:
        decode(data, channels=3, max_pixels=MAX_PIXELS)
    except ImageError:
        return True
    return False


def training_data(images, batch_size=50):
    crops = MultiCrop(global_size=16, local_size=8, local_number=2, blur_kernel=3)
    return TrainingData(
        open_source(images),
        crops,
        lambda number, grid, rng: np.zeros((number, grid[0] * grid[1]), dtype=bool),
        patch_size=8,
        decoding={"max_pixels": MAX_PIXELS},
        seed=0,
        batch_size=batch_size,
    )


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    """1,200 mutated files among 4,800 sound ones."""
    folder = tmp_path_factory.mktemp("mutants")
    for name, data in SOUND.items():
        (folder / f"sound0000.{name}").write_bytes(data)
        for copy in range(1, 4800 // len(SOUND)):
            os.link(folder / f"sound0000.{name}", folder / f"sound{copy:04d}.{name}")
    bad = set()
    for name, data in mutations(1200):
        (folder / name).write_bytes(data)
        if refused(data):
            bad.add(name)
    return folder, bad


@pytest.mark.processes
def test_mutated_files(mutants):
    folder, bad = mutants
    assert 600 < len(bad) < 1200  # of the others, the harm is in the picture, or in what nobody reads
    assert {name.split(".")[1] for name in bad} >= {"flip", "flips", "cut", "header", "lie", "empty", "tail"}
    data = training_data(folder)
    steps = 2 * -(-len(data.source) // data.batch_size)  # each image comes twice
    told = []
    images = BadImages(max_share=1.0, length=len(data.source))
    for step, batch in enumerate(make_loader(data, start_step=0, end_step=steps, num_workers=2)):
        assert len(batch.global_crops) == 100
        told += [name for _, name, _ in images.update(batch.skipped, (step + 1) * data.batch_size)]
    assert len(told) == len(set(told))
    assert set(told) == bad


MEASURE = """
import os
from faults.test_images import training_data
data = training_data({images!r})
for step in range({steps}):
    data[step]
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmPeak:")), flush=True)
os._exit(0)
"""


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, of Linux")
def test_mutated_files_take_no_memory(mutants, tmp_path):
    """Whatever a header says, a worker needs about what it needs for the sound files.

    Address space is counted, which is what was asked for: what of it is in memory depends on what else runs.
    """
    (tmp_path / "sound").mkdir()
    for path in mutants[0].glob("sound*"):
        os.link(path, tmp_path / "sound" / path.name)
    # A thread reserves 64 MiB or more for itself where it finds the others' memory busy.
    given = environment() | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}

    def peak(images, steps):
        code = MEASURE.format(images=str(images), steps=steps)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=given)
        return int(done.stdout)  # KiB

    assert peak(mutants[0], 120) < peak(tmp_path / "sound", 40) + 64 * 1024


@pytest.mark.processes
def test_bombs(tmp_path):
    """A small file that would be a large picture is refused by what its header says."""
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    for index in range(30):
        (tmp_path / f"{index}.png").write_bytes(SOUND["png"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    settings = SIZES | {"train.num_workers": 0, "train.steps": 8}
    run = dinoforge.train(tmp_path, "small", tmp_path / "run", **settings).out
    assert (run / "skipped.txt").read_text() == "bomb.png\tmore than 178956970 pixels; the limit is data.max_pixels\n"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 300 * 1024  # as RGB it would be 1.2 GB


def test_not_a_number_in_a_file(tmp_path):
    pixels = np.random.default_rng(0).random((30, 30), dtype=np.float32)
    for index in range(30):
        Image.fromarray(pixels).save(tmp_path / f"{index}.tif")
    pixels[3, 4] = np.nan
    Image.fromarray(pixels).save(tmp_path / "nan.tif")
    settings = SIZES | {"train.num_workers": 0, "student.in_chans": 1, "data.mean": [0.5], "data.std": [0.25]}
    run = dinoforge.train(tmp_path, "small", tmp_path / "run", **settings).out
    assert not (run / "skipped.txt").exists()  # it has no data there, and is read
    filled = dinoforge.read_image(tmp_path / "nan.tif", fill=9)
    assert filled[3, 4, 0] == 9
    assert np.array_equal(np.delete(filled.ravel(), 94), np.rint(np.delete(pixels.ravel(), 94) * 255.0))


@pytest.fixture
def open_folder():
    """A folder that every user can read, with 40 sound images."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for index in range(40):
            (folder / f"{index:02d}.png").write_bytes(SOUND["png"])
        yield folder


class Meanwhile:
    """Does something once, after so many images were read."""

    def __init__(self, folder, after, action):
        self.source, self.left, self.action = open_source(folder), after, action

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            self.action()
        return self.source.item(index).image

    def name(self, index):
        return self.source.name(index)


def test_files_that_vanish_during_the_run(open_folder, tmp_path):
    gone = [open_folder / f"{index:02d}.png" for index in (3, 17)]
    data = training_data(open_folder)
    stream = make_loader(data, start_step=0, end_step=4, num_workers=0)
    next(stream)
    for path in gone:
        path.unlink()
    skipped = {(name, reason) for batch in stream for _, name, reason in batch.skipped}
    assert {name for name, _ in skipped} == {path.name for path in gone}
    assert all("No such file" in reason for _, reason in skipped)


def test_files_that_may_not_be_read_any_more(open_folder):
    path = open_folder / "05.png"
    stream = make_loader(training_data(open_folder), start_step=0, end_step=4, num_workers=0)
    next(stream)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        skipped = {(name, reason) for batch in stream for _, name, reason in batch.skipped}
    finally:
        os.seteuid(user)
        path.chmod(stat.S_IRUSR)
    assert {name for name, _ in skipped} == {"05.png"}
    assert all("Permission denied" in reason for _, reason in skipped)


def test_a_folder_that_goes_away_ends_the_run_with_a_checkpoint(open_folder, tmp_path):
    """As when a network drive is lost."""
    images = Meanwhile(open_folder, 30, lambda: [path.unlink() for path in open_folder.iterdir()])
    files = {path: path.read_bytes() for path in open_folder.iterdir()}
    settings = SIZES | {"train.num_workers": 0}
    with pytest.raises(DataError, match="could not be read"):
        dinoforge.train(images, "small", tmp_path / "run", **settings)
    run = tmp_path / "run"
    (saved,) = (run / "checkpoints").iterdir()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert int(saved.name.removeprefix("step_")) == len(lines) > 0
    for path, data in files.items():  # the drive is back
        path.write_bytes(data)
    assert dinoforge.train(Meanwhile(open_folder, -1, None), "small", run, **settings).finished


# --- every bad image is named ----------------------------------------------------------------------------------------


def folder_of(folder, sound, bad, content=b"GIF89a and no more"):
    folder.mkdir()
    for index in range(sound):
        (folder / f"sound{index:03d}.png").write_bytes(SOUND["png"])
    for index in range(bad):
        (folder / f"bad{index:03d}.png").write_bytes(content)
    return folder


def skipped_in(run):
    lines = (run / "skipped.txt").read_text().splitlines()
    assert len(lines) == len(set(lines))
    return dict(line.split("\t") for line in lines)


def test_all_bad_images_are_listed_before_too_many_of_them_end_the_run(tmp_path, capsys):
    images = folder_of(tmp_path / "images", sound=60, bad=40)
    settings = SIZES | {"train.num_workers": 0, "train.batch_size_per_gpu": 64}
    with pytest.raises(DataError, match=r"data\.max_bad_share allows 10\.0%.* such as bad\d+\.png: ") as raised:
        dinoforge.train(images, "small", tmp_path / "run", **settings)
    listed = skipped_in(tmp_path / "run")
    assert len(listed) > 20
    assert set(listed) <= {f"bad{index:03d}.png" for index in range(40)}
    assert f"{len(listed)} of about 64 images could not be read" in str(raised.value)
    assert str(raised.value).endswith(f". Each one is listed in {tmp_path / 'run' / 'skipped.txt'}")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    assert len(told) == 21
    assert told[-1] == f"skipped  and {len(listed) - 20} more, which {tmp_path / 'run' / 'skipped.txt'} lists"
    for line in told[:-1]:
        name, _, reason = line.removeprefix("skipped  ").partition(": ")
        assert listed[name] == reason


@pytest.mark.processes
def test_bad_images_are_listed_where_none_is_found_for_a_batch(tmp_path):
    images = folder_of(tmp_path / "images", sound=1, bad=60)
    settings = SIZES | {"train.num_workers": 1, "data.max_bad_share": 1.0}
    with pytest.raises(DataError, match=r"10 images in a row could not be read: \d+ such as bad\d+\.png: damaged"):
        dinoforge.train(images, "small", tmp_path / "run", **settings)
    assert len(skipped_in(tmp_path / "run")) >= 5


def test_a_rank_lists_what_it_alone_met(tmp_path, monkeypatch):
    run = directory.RunDirectory(tmp_path)
    known = BadImages(0.1, 100)
    known.update([(1, "1.png", "empty file")], 64)
    skipped = [(1, "1.png", "empty file"), (2, "2.png", "empty file"), (2, "2.png", "empty file")]
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    told = []
    _listed(BadImagesError("as all ranks have it", skipped), run, known, told.append)
    assert not run.skipped.exists()
    error = _listed(BadImagesError("of this one", skipped, of_one_rank=True), run, known, told.append)
    assert run.skipped.read_text() == "2.png\tempty file\n"
    assert str(error) == f"of this one. Each one is listed in {run.skipped}"
    assert told == []


@pytest.mark.processes
def test_ranks_list_each_bad_image_once(tmp_path):
    images = folder_of(tmp_path / "images", sound=60, bad=40)
    keys = [
        f"{key}={value}" for key, value in (SIZES | {"train.num_workers": 0, "train.batch_size_per_gpu": 32}).items()
    ]
    command = [sys.executable, "-m", "dinoforge", "train", str(images), "--out", str(tmp_path / "run"), "--nproc", "2"]
    done = subprocess.run([*command, *keys], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    listed = skipped_in(tmp_path / "run")
    assert f"{len(listed)} of about 64 images could not be read" in done.stderr
    assert len(listed) > 20


@pytest.mark.parametrize("call", ["dry run", "bench", "auto"])
def test_what_cannot_be_read_at_all_is_told_by_kind(tmp_path, call):
    images = folder_of(tmp_path / "images", sound=0, bad=9)
    for index in range(3):
        (images / f"pointer{index}.jpg").write_bytes(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        )
    calls = {
        "dry run": lambda: dinoforge.train(images, "small", tmp_path / "run", dry_run=True, **SIZES),
        "auto": lambda: dinoforge.train(images, "auto", tmp_path / "run", dry_run=True),
        "bench": lambda: bench(images, "small", **SIZES),
    }
    told = r"none of 12 .*: 9 such as bad000\.png: damaged[^;]*; 3 such as pointer0\.jpg: "
    with pytest.raises(DataError, match=told):
        calls[call]()


def test_embedding_tells_every_kind_of_reason(tmp_path, run):
    images = folder_of(tmp_path / "images", sound=3, bad=9)
    (images / "empty.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"10 of 13 images cannot be read: 9 such as bad000\.png: .*; empty\.png: empty"
    ):
        dinoforge.embed(run, images)


def test_a_probe_tells_which_of_its_images_it_could_not_read(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for label in ("a", "b"):
        folder_of(images / label, sound=30, bad=1)
    settings = SIZES | {"train.num_workers": 0, "probe.every_steps": 16, "report.every_minutes": None}
    dinoforge.train(images, "small", tmp_path / "run", **settings)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("probe ") and "cannot" in line]
    (line,) = told
    assert "2 of its 62 images cannot be read and take no part: 2 such as a/bad000.png: damaged" in line


def test_an_export_names_the_image_that_it_cannot_compare_on(tmp_path, run):
    images = Path(directory.RunDirectory(run).info()["data"]["path"])
    first = sorted(images.iterdir())[0]
    data = first.read_bytes()
    first.write_bytes(b"")
    report = export(run, "safetensors", tmp_path / "x.safetensors")
    first.write_bytes(data)
    assert f"random images, because {first.name} of the run's cannot be read (empty file)" in str(report)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on sound images."""
    folder = tmp_path_factory.mktemp("sound")
    images = folder_of(folder / "images", sound=20, bad=0)
    return dinoforge.train(images, "small", folder / "run", **SIZES | {"train.num_workers": 0, "train.steps": 2}).out
