"""Checkpoints: whole or not there, few enough, and harmless."""

import contextlib
import os
import pickle
import resource
import signal

import pytest
import torch
from safetensors import SafetensorError

from dinoforge import checkpoint, files
from dinoforge.errors import RunError, WeightsError
from dinoforge.models.vit import VisionTransformer
from dinoforge.weights import Backbone, ImageInput, save_backbone

CPU = torch.device("cpu")


def state_of(step):
    return {
        "step": step,
        "seconds": 1.5,
        "weights": {"a": torch.arange(12.0).view(3, 4) * step, "half": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 0.1, "names": ["a"]}]},
        "scaler": None,
    }


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.dtype is b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


def names(run):
    return sorted(os.listdir(checkpoint.folder_of(run)))


def test_what_is_saved_comes_back(tmp_path):
    path = checkpoint.save(tmp_path, 7, state_of(7))
    assert path.is_file()
    assert_same(checkpoint.load(tmp_path, 7, CPU), state_of(7))
    assert names(tmp_path) == [path.name]


def test_saving_again_replaces(tmp_path):
    checkpoint.save(tmp_path, 7, state_of(1))
    checkpoint.save(tmp_path, 7, state_of(2))
    assert checkpoint.load(tmp_path, 7, CPU)["step"] == 2


def test_steps_rise_by_number(tmp_path):
    assert checkpoint.steps(tmp_path) == []
    for step in (100_000_000, 100, 99_999_999, 3):  # the first has one digit more than names are padded to
        checkpoint.save(tmp_path, step, {"step": step})
    assert checkpoint.steps(tmp_path) == [3, 100, 99_999_999, 100_000_000]
    for step in checkpoint.steps(tmp_path):
        assert checkpoint.load(tmp_path, step, CPU) == {"step": step}


def test_other_files_are_no_checkpoints(tmp_path):
    checkpoint.save(tmp_path, 5, {})
    folder = checkpoint.folder_of(tmp_path)
    for name in (".step_00000009.pt.partial", "step_00000009.pt.partial", "step_9.pt", "step_0000000x.pt", "notes.txt"):
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
        checkpoint.save(tmp_path, step, {"step": step})
    for _ in range(2):  # the second time there is nothing to do
        checkpoint.prune(tmp_path, keep_last=keep_last, keep_every=keep_every)
        assert checkpoint.steps(tmp_path) == left


def test_pruning_an_empty_run(tmp_path):
    checkpoint.prune(tmp_path, keep_last=1, keep_every=None)
    assert list(tmp_path.iterdir()) == []


# Damage


def put(run, data, step=5):
    path = checkpoint.folder_of(run) / f"step_{step:08d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(WeightsError, match="step_00000005"):
        checkpoint.load(tmp_path, 5, CPU)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint(tmp_path, share):
    data = checkpoint.save(tmp_path, 5, state_of(5)).read_bytes()
    path = put(tmp_path, data[: int(len(data) * share)])
    with pytest.raises(WeightsError, match="cannot read") as caught:
        checkpoint.load(tmp_path, 5, CPU)
    assert str(path) in str(caught.value)


def test_a_checkpoint_full_of_zeros(tmp_path):
    put(tmp_path, bytes(1000))
    with pytest.raises(WeightsError):
        checkpoint.load(tmp_path, 5, CPU)


@pytest.mark.parametrize("data", [b"hello\n", b"u", b"\x80\x02X"])
def test_a_file_that_is_something_else(tmp_path, data):
    put(tmp_path, data)
    with pytest.raises(WeightsError):
        checkpoint.load(tmp_path, 5, CPU)


def test_a_file_that_holds_something_else(tmp_path):
    path = checkpoint.folder_of(tmp_path) / "step_00000005.pt"
    path.parent.mkdir()
    torch.save([1, 2, 3], path)
    with pytest.raises(WeightsError):
        checkpoint.load(tmp_path, 5, CPU)


def test_every_flipped_byte_of_the_values_is_found(tmp_path):
    data = checkpoint.save(tmp_path, 5, state_of(5)).read_bytes()
    weights = torch.arange(12.0).mul(5).numpy().tobytes()
    first = data.index(weights)
    for place in range(first, first + len(weights)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        put(tmp_path, bytes(damaged))
        with pytest.raises(WeightsError, match="checksum"):
            checkpoint.load(tmp_path, 5, CPU)


def test_a_flipped_byte_anywhere_is_found_or_changes_nothing(tmp_path):
    data = checkpoint.save(tmp_path, 5, state_of(5)).read_bytes()
    found = 0
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 0x20
        put(tmp_path, bytes(damaged))
        try:
            assert_same(checkpoint.load(tmp_path, 5, CPU), state_of(5))  # in padding between entries
        except WeightsError:
            found += 1
    assert found > 100


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    assert checkpoint.load_newest(tmp_path, CPU) == (None, [])
    for step in (10, 20, 30, 40):
        checkpoint.save(tmp_path, step, state_of(step))
    put(tmp_path, b"", step=40)
    whole = (checkpoint.folder_of(tmp_path) / "step_00000030.pt").read_bytes()
    data = bytearray(whole)
    data[whole.index(torch.arange(12.0).mul(30).numpy().tobytes()) + 5] ^= 1
    put(tmp_path, bytes(data), step=30)
    state, damage = checkpoint.load_newest(tmp_path, CPU)
    assert_same(state, state_of(20))
    assert [("step_00000040.pt" in text, "step_00000030.pt" in text) for text in damage] == [
        (True, False),
        (False, True),
    ]
    # What is damaged no longer counts, or keeping the newest would delete the good ones.
    assert checkpoint.steps(tmp_path) == [10, 20]
    assert [name for name in names(tmp_path) if name.endswith(".damaged")] == [
        "step_00000030.pt.damaged",
        "step_00000040.pt.damaged",
    ]
    assert checkpoint.load_newest(tmp_path, CPU)[1] == []


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path):
    for step in (1, 2):
        put(tmp_path, b"zeros", step=step)
    with pytest.raises(WeightsError, match="No other checkpoint is left"):
        checkpoint.load_newest(tmp_path, CPU)
    assert checkpoint.steps(tmp_path) == [1, 2]


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, protocol):
    proof = tmp_path / "proof"
    path = put(tmp_path, pickle.dumps({"step": Bomb(proof)}, protocol=2))
    if protocol == "torch":
        torch.save({"step": Bomb(proof)}, path)
    with pytest.raises(WeightsError, match=r"UnpicklingError|BadZipFile"):
        checkpoint.load(tmp_path, 5, CPU)
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


def test_a_checkpoint_that_fails_midway_leaves_the_old_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 5, state_of(5))

    def torn(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    for step in (5, 6):
        with pytest.raises(RunError, match="no space left"):
            checkpoint.save(tmp_path, step, state_of(step))
    monkeypatch.undo()
    assert names(tmp_path) == ["step_00000005.pt"]
    assert_same(checkpoint.load(tmp_path, 5, CPU), state_of(5))


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


def test_what_a_killed_write_left_is_overwritten(tmp_path):
    put(tmp_path, b"").unlink()
    (checkpoint.folder_of(tmp_path) / ".step_00000005.pt.partial").write_bytes(b"left over" * 1000)
    checkpoint.save(tmp_path, 5, state_of(5))
    assert names(tmp_path) == ["step_00000005.pt"]
    assert_same(checkpoint.load(tmp_path, 5, CPU), state_of(5))


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
    checkpoint.save(run, 5, {"a": torch.zeros(10_000)})


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
