"""Checkpoints: whole or not there, few enough, and harmless."""

import contextlib
import errno
import hashlib
import os
import pickle
import resource
import shutil
import signal
import subprocess

import pytest
import torch
from safetensors import SafetensorError

from dinoforge.data.image_input import ImageInput
from dinoforge.errors import RunError, WeightsError
from dinoforge.models.vit import VisionTransformer
from dinoforge.runs import checkpoint
from dinoforge.system import files
from dinoforge.weights.backbone import Backbone, save_backbone


def tensors_of(step):
    return {
        "a": torch.arange(12.0).view(3, 4) * step,
        "half": torch.full((2,), step, dtype=torch.bfloat16),
        "optimizer.a.step": torch.tensor(float(step)),
        "none": torch.empty(0, 3),
    }


def save(run, step):
    return checkpoint.save(run, step, tensors_of(step), {"step": step, "seconds": 0.1 + step, "scaler": None})


def assert_loads(run, step):
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(step).items()}
    assert checkpoint.load(run, step, tensors) == {"step": step, "seconds": 0.1 + step, "scaler": None}
    for name, expected in tensors_of(step).items():
        assert torch.equal(tensors[name], expected)


def names(run):
    return sorted(os.listdir(checkpoint.folder_of(run)))


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path, 7)
    assert_loads(tmp_path, 7)
    assert names(tmp_path) == [path.name]


def test_saving_again_replaces(tmp_path):
    checkpoint.save(tmp_path, 7, tensors_of(1), {})
    save(tmp_path, 7)
    assert_loads(tmp_path, 7)
    assert names(tmp_path) == ["step_00000007"]


def test_large_states_are_spread_over_files(tmp_path):
    tensors = {f"{i}": torch.randn(size) for i, size in enumerate([10, 100, 100, 500, 1, 100, 249])}
    path = checkpoint.save(tmp_path, 1, tensors, {}, file_bytes=1000)
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert len(sizes) == 4  # 10 + 100 + 100 numbers, 500, 1 + 100, 249
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    checkpoint.load(tmp_path, 1, loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_copies_do_not_follow_the_state():
    tensors = {"a": torch.ones(3, requires_grad=True)}
    copies = checkpoint.whole(tensors, copy=True)
    tensors["a"].detach().zero_()
    assert copies["a"].tolist() == [1, 1, 1]
    assert not copies["a"].requires_grad


def test_steps_rise_by_number(tmp_path):
    assert checkpoint.steps(tmp_path) == []
    for step in (100_000_000, 100, 99_999_999, 3):  # the first has one digit more than names are padded to
        save(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [3, 100, 99_999_999, 100_000_000]
    for step in checkpoint.steps(tmp_path):
        assert_loads(tmp_path, step)


def test_other_files_are_no_checkpoints(tmp_path):
    save(tmp_path, 5)
    folder = checkpoint.folder_of(tmp_path)
    for name in (".step_00000009.partial", "step_00000009.partial", "step_9", "step_0000000x", "notes.txt"):
        (folder / name).write_text("")
    assert checkpoint.steps(tmp_path) == [5]
    checkpoint.prune(tmp_path, keep_last=1, keep_every=None)
    assert len(names(tmp_path)) == 6


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (1, None, [60]),
        (2, None, [50, 60]),
        (6, None, [10, 20, 30, 40, 50, 60]),
        (99, None, [10, 20, 30, 40, 50, 60]),
        (1, 20, [20, 40, 60]),
        (2, 30, [30, 50, 60]),
        (1, 7, [60]),
    ],
)
def test_pruning_keeps_the_newest_and_the_multiples(tmp_path, keep_last, keep_every, left):
    for step in range(10, 61, 10):
        save(tmp_path, step)
    for _ in range(2):  # the second time there is nothing to do
        checkpoint.prune(tmp_path, keep_last=keep_last, keep_every=keep_every)
        assert checkpoint.steps(tmp_path) == left


def test_pruning_an_empty_run(tmp_path):
    checkpoint.prune(tmp_path, keep_last=1, keep_every=None)
    assert list(tmp_path.iterdir()) == []


# Damage


def damages():
    """Ways to damage the folder of a checkpoint."""

    def change(name, change):
        def do(path):
            (file,) = path.glob(name)
            file.write_bytes(change(file.read_bytes()))

        return do

    for name in ("*.safetensors", "state.json", "SHA256SUMS"):
        for what, how in {
            "empty": lambda data: b"",
            "half": lambda data: data[: len(data) // 2],
            "short of some bytes": lambda data: data[:-3],
            "longer": lambda data: data + b"\0",
            "zeros": lambda data: bytes(len(data)),
        }.items():
            yield pytest.param(change(name, how), id=f"{name} {what}")
        yield pytest.param(lambda path, name=name: next(path.glob(name)).unlink(), id=f"{name} missing")
    yield pytest.param(lambda path: [file.unlink() for file in path.iterdir()], id="nothing in it")


@pytest.mark.parametrize("damage", list(damages()))
def test_damage_is_found_before_anything_is_read(tmp_path, damage):
    path = save(tmp_path, 5)
    damage(path)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(5).items()}
    with pytest.raises(WeightsError, match="step_00000005 is damaged"):
        checkpoint.load(tmp_path, 5, tensors)
    assert all(not tensor.any() for tensor in tensors.values())


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(WeightsError, match="step_00000005"):
        checkpoint.load(tmp_path, 5, {})


def test_every_flipped_byte_is_found(tmp_path):
    path = save(tmp_path, 5)
    for file in path.iterdir():
        data = file.read_bytes()
        for place in range(0, len(data), 11):
            damaged = bytearray(data)
            damaged[place] ^= 0x20
            file.write_bytes(damaged)
            with pytest.raises(WeightsError, match="damaged"):
                checkpoint.load(tmp_path, 5, {})
        file.write_bytes(data)
    assert_loads(tmp_path, 5)


@pytest.mark.processes
def test_the_sums_are_those_of_the_well_known_tool(tmp_path):
    path = save(tmp_path, 5)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, check=True, capture_output=True)


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(1).items()}
    assert checkpoint.newest(tmp_path) == (None, [])
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    (checkpoint.path_of(tmp_path, 40) / "SHA256SUMS").unlink()
    (file,) = checkpoint.path_of(tmp_path, 30).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    step, damage = checkpoint.newest(tmp_path)
    assert step == 20
    assert checkpoint.load(tmp_path, step, tensors, verify=False)["step"] == 20
    assert all(torch.equal(tensors[name], expected) for name, expected in tensors_of(20).items())
    assert [("step_00000040" in text, "step_00000030" in text) for text in damage] == [(True, False), (False, True)]
    # What is damaged no longer counts, or keeping the newest would delete the good ones.
    assert names(tmp_path) == ["step_00000010", "step_00000020", "step_00000030.damaged", "step_00000040.damaged"]
    assert checkpoint.newest(tmp_path) == (20, [])


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path):
    for step in (1, 2):
        shutil.rmtree(save(tmp_path, step) / "SHA256SUMS", ignore_errors=True)
        (checkpoint.path_of(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(WeightsError, match="No other checkpoint is left"):
        checkpoint.newest(tmp_path)
    assert checkpoint.steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("others", "word"),
    [
        ({"b": torch.zeros(2)}, "b"),
        ({"a": torch.zeros(4, 4)}, "4, 4"),
    ],
)
def test_a_checkpoint_of_other_networks(tmp_path, others, word):
    save(tmp_path, 5)
    with pytest.raises(WeightsError, match=rf"does not fit this run: .*{word}"):
        checkpoint.load(tmp_path, 5, others)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["shard", "state.json", ".metadata"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, name):
    """Also not where the sums are right, as those of a checkpoint that somebody made on purpose."""
    path, proof = save(tmp_path, 5), tmp_path / "proof"
    file = next((f for f in path.iterdir() if f.name.startswith(name)), path / name)
    file.write_bytes(pickle.dumps({"step": Bomb(proof)}))
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.iterdir() if f.name != "SHA256SUMS"}
    (path / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(5).items()}
    if name == ".metadata":  # where torch.distributed.checkpoint keeps a pickle in its own format
        checkpoint.load(tmp_path, 5, tensors)
    else:
        with pytest.raises(WeightsError):
            checkpoint.load(tmp_path, 5, tensors)
    assert not proof.exists()


# Writing


class Stop(BaseException):
    """Like KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("error", [Stop("stopped"), ValueError("no"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("existed", [False, True])
def test_a_write_that_fails_midway_leaves_what_was_there(tmp_path, error, existed):
    path = tmp_path / "folder" / "file"
    if existed:
        path.parent.mkdir()
        path.write_bytes(b"old")

    def write(temporary):
        temporary.write_bytes(b"half of the ne")
        raise error

    with pytest.raises(RunError if isinstance(error, OSError) else type(error)):
        files.write_atomically(path, write)
    assert [p.name for p in path.parent.iterdir()] == (["file"] if existed else [])
    if existed:
        assert path.read_bytes() == b"old"


def test_the_new_file_is_complete_before_it_has_its_name(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = []

    def write(temporary):
        temporary.write_bytes(b"new")
        seen.append((temporary.parent, path.read_bytes()))

    files.write_atomically(path, write)
    assert seen == [(tmp_path, b"old")]
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("step", [5, 6])
def test_a_checkpoint_that_fails_midway_leaves_the_old_one(tmp_path, monkeypatch, step):
    before = files_of(save(tmp_path, 5))

    def torn(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", torn)
    with pytest.raises(RunError, match="no space left"):
        save(tmp_path, step)
    monkeypatch.undo()
    assert names(tmp_path) == ["step_00000005"]
    assert files_of(checkpoint.path_of(tmp_path, 5)) == before


def test_what_a_kill_left_is_cleaned(tmp_path):
    save(tmp_path, 4)
    for name in (".step_00000005.partial", ".step_00000003.deleted"):
        (checkpoint.folder_of(tmp_path) / name).mkdir()
        (checkpoint.folder_of(tmp_path) / name / "left.safetensors").write_bytes(b"left over" * 1000)
    save(tmp_path, 5)
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == ["step_00000004", "step_00000005"]
    assert_loads(tmp_path, 5)


def test_cleaning_a_new_run(tmp_path):
    checkpoint.clean(tmp_path)


@contextlib.contextmanager
def files_of_2000_bytes():
    """Longer files cannot be written, as on a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def save_checkpoint(run):
    checkpoint.save(run, 5, {"a": torch.zeros(10_000)}, {})


def save_weights(run):
    architecture = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "image_size": 16}
    image = ImageInput(size=16, in_chans=3, mean=(0.5,), std=(0.5,), sixteen_bit="full", max_pixels=1)
    backbone = Backbone(VisionTransformer(**architecture), architecture, image, 0)
    save_backbone(checkpoint.folder_of(run) / "teacher.safetensors", backbone)


WRITERS = pytest.mark.parametrize("save", [save_checkpoint, save_weights])


@WRITERS
def test_a_disk_that_takes_no_more_is_said_so(tmp_path, save):
    with pytest.raises(RunError), files_of_2000_bytes():
        save(tmp_path)


@WRITERS
def test_on_a_disk_that_takes_no_more_nothing_is_left(tmp_path, save):
    with pytest.raises((RunError, RuntimeError, SafetensorError)), files_of_2000_bytes():
        save(tmp_path)
    assert names(tmp_path) == []


STRANGERS = (
    ".DS_Store",
    "._state.json",
    "._shard-00001-model-00001-of-00001.safetensors",
    "shard-00001-model-00001-of-00001 (1).safetensors",
    "desktop.ini",
    "Thumbs.db",
    ".nfs000000000012a4b0",
    ".gitkeep",
)


def test_files_that_systems_put_into_a_checkpoint_do_not_matter(tmp_path):
    path = save(tmp_path, 5)
    for name in STRANGERS:
        (path / name).write_bytes(b"\0\x05\x16\x07")
        (path.parent / name).write_bytes(b"")
    (path / "lost+found").mkdir()
    (path.parent / "@eaDir").mkdir()
    assert checkpoint.newest(tmp_path) == (5, [])
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(5).items()}
    checkpoint.load(tmp_path, 5, tensors)
    for name, tensor in tensors_of(5).items():
        assert torch.equal(tensors[name], tensor)
    save(tmp_path, 6)
    checkpoint.prune(tmp_path, keep_last=1, keep_every=None)
    assert checkpoint.steps(tmp_path) == [6]


def test_what_another_user_left_half_done_is_told_and_in_nobodys_way(tmp_path, monkeypatch):
    folder = checkpoint.folder_of(tmp_path)
    for left in (".step_00000005.partial", ".step_00000005.12.partial", ".step_00000003.deleted"):
        (folder / left).mkdir(parents=True)
        (folder / left / "shard").touch()

    def refuse(path, *args, **kwargs):
        if not kwargs.get("ignore_errors"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", refuse)
        kept = checkpoint.clean(tmp_path)
        assert len(kept) == 3
        assert all("cannot be deleted: Permission denied" in sentence for sentence in kept)
        save(tmp_path, 5)
    assert checkpoint.newest(tmp_path) == (5, [])
    assert checkpoint.clean(tmp_path) == []
    assert [p.name for p in folder.iterdir()] == ["step_00000005"]


def test_the_same_tensors_make_the_same_files(tmp_path):
    sums = {(save(tmp_path / str(i), 5) / "SHA256SUMS").read_text() for i in range(6)}
    assert len(sums) == 1
