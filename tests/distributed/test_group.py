"""How ranks come together and fall apart, without any: what is refused, passed on, told, and started again."""

import json
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dinoforge import errors
from dinoforge.builders.layout import mode_here, note_of_mode
from dinoforge.builders.networks import build_student_teacher
from dinoforge.cli import ranks as ranks_module
from dinoforge.errors import DataError, LostRankError, OutOfMemoryError, RecipeError, TrainingError, WorkerError
from dinoforge.recipe.load import load_recipe
from dinoforge.system import distributed
from dinoforge.training.parallel import copies_and_shards

GPU = torch.device("cuda", 1)


class Started(Exception):
    """Raised in the place of a process group, with what it was asked for."""


@pytest.fixture
def two_ranks(monkeypatch):
    """This process is rank 1 of 2, on a machine with GPUs; gives a function that says which GPU each rank has."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda *given, **named: iter([(HashStore(), 1, 2)]))
    monkeypatch.setattr(distributed, "_agreed_name", lambda *given: "these")

    def start(*given, **named):
        raise Started(given, named)

    monkeypatch.setattr(dist, "init_process_group", start)

    def on(*gpus):
        places = [distributed._Place("host", f"machine {rank}", 1, gpu) for rank, gpu in enumerate(gpus)]
        monkeypatch.setattr(distributed, "_places", lambda *given: places)

    return on


def test_ranks_that_share_a_gpu_are_refused_before_nccl_is_asked(two_ranks):
    two_ranks("GPU-a", "GPU-a")
    words = r"ranks 0 and 1 on host share one GPU \(GPU-a\): start as many ranks as there are GPUs"
    with pytest.raises(RecipeError, match=words), distributed.process_group(GPU):
        pass
    with pytest.raises(Started), distributed.process_group(GPU, "gloo"):  # slow, but right
        pass


@pytest.mark.parametrize(
    ("device", "backend", "expected"),
    [
        (GPU, "auto", ("cpu:gloo,cuda:nccl", GPU)),
        (GPU, "nccl", ("cpu:gloo,cuda:nccl", GPU)),
        (GPU, "gloo", ("gloo", None)),
        (torch.device("cpu"), "auto", ("gloo", None)),
    ],
)
def test_a_group_knows_its_device_and_its_patience(two_ranks, device, backend, expected):
    two_ranks("GPU-a", "GPU-b")
    with pytest.raises(Started) as started, distributed.process_group(device, backend, timedelta(minutes=7)):
        pass
    (name,), named = started.value.args
    assert (name, named["device_id"]) == expected
    assert (named["rank"], named["world_size"], named["timeout"]) == (1, 2, timedelta(minutes=7))


def test_several_ranks_on_mps_are_refused(two_ranks):
    words = "several ranks need device=cuda or device=cpu, not mps"
    with pytest.raises(RecipeError, match=words), distributed.process_group(torch.device("mps")):
        pass


@pytest.mark.parametrize("mode", ["fsdp", "hsdp"])
def test_gloo_cannot_shard_what_is_on_a_gpu(monkeypatch, mode):
    keys = {"parallel.mode": mode, "parallel.backend": "gloo"}
    recipe, _ = load_recipe("small", keys | ({"parallel.shard_ranks": 2} if mode == "hsdp" else {}))
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    properties = type("Properties", (), {"total_memory": 80e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with torch.device("meta"):
        networks = build_student_teacher(recipe)
    assert mode_here(recipe, networks, torch.device("cpu")) == mode
    with pytest.raises(RecipeError, match=rf"parallel\.backend=gloo cannot shard .*parallel\.mode is {mode}"):
        mode_here(recipe, networks, GPU)


@pytest.mark.parametrize(
    ("ranks", "inner", "words"),
    [
        (2, 2, "2 ranks cannot be cut into copies of 2 ranks each.*hsdp needs 4 ranks at least"),
        (6, 4, "6 ranks cannot be cut into copies of 4 ranks each"),
        (4, 1, "more than 1"),
    ],
)
def test_copies_of_shards_that_cannot_be(ranks, inner, words):
    with pytest.raises(RecipeError, match=words):
        copies_and_shards(ranks, inner)
    assert copies_and_shards(64, 8) == (8, 8)


def test_a_mode_that_one_process_cannot_have_is_told():
    sharded, plain = (load_recipe("small", keys)[0] for keys in ({"parallel.mode": "fsdp"}, {}))
    assert "parallel.mode=fsdp means nothing: start several ranks" in note_of_mode(sharded, "none")
    assert note_of_mode(sharded, "fsdp") is None
    assert note_of_mode(plain, "none") is None


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:56043"), True),
        (dist.DistNetworkError("Connection was likely closed"), True),
        (dist.DistBackendError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"), True),
        # A cause, which "another rank is gone" would hide.
        (dist.DistBackendError("NCCL error: unhandled system error: No space left on device, /dev/shm/nccl"), False),
        (RuntimeError("The size of tensor a (3) must match"), False),
    ],
)
def test_errors_that_say_that_another_rank_is_gone(error, lost):
    assert distributed.is_lost_connection(error) == lost


def test_a_failed_rank_is_seen_by_the_others():
    store = HashStore()
    places = [distributed._Place("host", "machine", process, None) for process in (1, 1, 2**22 + 1)]
    first, second = (distributed._Others(store, rank, places[:2], timedelta(seconds=5)) for rank in (0, 1))
    assert second._look() is None
    first.warn(DataError("the drive is gone\nsince noon"))
    assert second._look() == "rank 0 failed (DataError: the drive is gone)"
    first.warn(DataError("later"))
    assert second._look() == "rank 0 failed (DataError: the drive is gone)"


def test_a_killed_rank_is_seen_and_one_that_is_done_is_not():
    places = [distributed._Place("host", "machine", process, None) for process in (1, 2**22 + 1)]  # above any process
    for is_done in (False, True):
        store = HashStore()
        if is_done:
            store.set("1 is done", "")
        seen = distributed._Others(store, 0, places, timedelta(seconds=5))._look()
        assert seen == (None if is_done else "rank 1 was killed")
    elsewhere = [places[0], distributed._Place("host", "another machine", 2**22 + 1, None)]
    assert distributed._Others(HashStore(), 0, elsewhere, timedelta(seconds=5))._look() is None


def failure(folder, rank, code, error=None, *, later=0.0, monkeypatch):
    """What the agent knows of a rank that ended."""
    file = folder / f"{rank}.json"
    if error is not None:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        monkeypatch.setattr(errors.time, "time", lambda: 1000.5 + later)
        errors.record_failure(error)
        monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 1000.6 + later)
        return ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(file))


def test_torchrun_can_read_what_a_rank_failed_of(tmp_path, monkeypatch):
    told = failure(tmp_path, 1, 2, DataError("the drive\nis gone"), monkeypatch=monkeypatch)
    missed = failure(tmp_path, 3, 4, LostRankError("another rank is gone"), later=-0.2, monkeypatch=monkeypatch)
    table = ChildFailedError("dinoforge", {3: missed, 1: told})
    assert "the drive\n  is gone" in table.format_msg()
    assert table.get_first_failure()[0] == 1
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError as error:
        told = failure(tmp_path, 0, 1, error, monkeypatch=monkeypatch)
    table = ChildFailedError("dinoforge", {0: told}).format_msg()
    assert "Traceback (most recent call last)" in table
    assert "ZeroDivisionError: a bug" in table


def test_what_a_rank_failed_of_first_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    errors.record_failure(DataError("the drive is gone"))
    errors.record_failure(LostRankError("another rank is gone"))
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "the drive is gone"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")  # as an agent without a folder for logs says it
    errors.record_failure(DataError("nobody asks"))


@pytest.mark.parametrize(
    ("failures", "line", "code"),
    [
        # Rank 0 missed rank 2, and is found first.
        (
            {0: (4, LostRankError("gone"), -0.2), 2: (2, DataError("bad"), 0.0)},
            "error on rank 2: bad",
            2,
        ),
        ({0: (1, OSError("crash"), 0.3), 1: (3, OutOfMemoryError("full"), 0.0)}, "error on rank 1: full", 3),
        ({0: (2, RecipeError("no"), 0.1), 1: (2, RecipeError("no"), 0.0)}, "error: no", 2),
        ({0: (2, DataError("bad"), 0.0), 1: (-signal.SIGTERM, None, -0.5)}, "error: bad", 2),
        ({0: (1, OSError("crash"), 0.0), 3: (-signal.SIGKILL, None, 0.0)}, "error: rank 3 was ended by SIGKILL", 137),
        ({0: (-signal.SIGABRT, None, 0.0), 1: (1, OSError("crash"), 0.0)}, "error on rank 1: OSError: crash", 1),
        ({1: (4, LostRankError("gone"), 0.0)}, "error on rank 1: gone", 4),
        ({1: (7, None, 0.0)}, "error: rank 1 ended with exit code 7", 7),
    ],
)
def test_the_launcher_tells_the_cause(failures, line, code, tmp_path, monkeypatch, capsys):
    made = {
        rank: failure(tmp_path, rank, exitcode, error, later=later, monkeypatch=monkeypatch)
        for rank, (exitcode, error, later) in failures.items()
    }
    monkeypatch.setattr(ranks_module, "_run", lambda arguments, ranks: made)
    assert ranks_module.launch(["train"], ranks=4, restarts=0) == code
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    ("codes", "starts", "ended"),
    [
        ([2], 1, 2),
        ([3], 1, 3),
        ([1, 1, 1], 3, 1),
        ([1, 4, 0], 3, 0),
        ([-9, 0], 2, 0),
        ([-9, 2], 2, 2),
        ([143], 1, 143),  # of a signal that a rank got itself
        ([130], 1, 130),
    ],
)
def test_only_what_may_end_otherwise_is_started_again(codes, starts, ended, tmp_path, monkeypatch):
    left = list(codes)

    def run(arguments, ranks):
        code = left.pop(0)
        return {1: failure(tmp_path, 1, code, monkeypatch=monkeypatch)} if code else {}

    monkeypatch.setattr(ranks_module, "_run", run)
    assert ranks_module.launch(["train"], ranks=2, restarts=2) == ended
    assert len(codes) - len(left) == starts


def test_a_data_worker_that_died_may_live_the_next_time():
    assert WorkerError.exit_code not in errors.RECURRING
    assert {DataError.exit_code, TrainingError.exit_code, OutOfMemoryError.exit_code} <= errors.RECURRING
    assert LostRankError.exit_code not in errors.RECURRING


def test_a_group_of_one_process_watches_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(distributed, "_Others", None)
    with distributed.process_group(torch.device("cpu")):
        assert not dist.is_initialized()
