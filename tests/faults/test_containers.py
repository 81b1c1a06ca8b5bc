"""Little shared memory, few file descriptors, no folder for sockets; scripts and images under spawn and forkserver."""

import itertools
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dinoforge.data import preflight, workers
from dinoforge.data.batches import _needs, make_loader
from dinoforge.data.preflight import Needs, require_room, require_sendable
from dinoforge.data.sources import open_source
from dinoforge.data.workers import Table
from dinoforge.errors import DataError, WorkerError
from dinoforge.features import extract
from faults.test_images import SIZES, training_data  # type: ignore[import-not-found]
from programs import environment

pytestmark = pytest.mark.processes

NEEDS = Needs(workers=2, batches=5, batch_bytes=1000, batch_tensors=5)

PROGRAM = """
import os, resource, sys
import numpy as np
from dinoforge.features import extract
from dinoforge.data import batches as loader, workers
from dinoforge.errors import DataError
from faults.test_images import training_data

class Images:
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return np.full((20, 20, 3), index, dtype=np.uint8)

if __name__ == "__main__":
    {before}
    held = []
    try:
        data = training_data(Images(), batch_size=400)
        for batch in loader.make_loader(data, start_step=0, end_step=20, num_workers=2, timeout=3600):
            held.append(batch)
    except DataError as error:
        print(len(held), error)
        sys.exit(error.exit_code)
"""
UNCHECKED = "loader.require_room = lambda needs: None"


def program(before="pass"):
    return PROGRAM.format(before=before)


def run(*command, **more):
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment(), **more)


def in_small_container(size, code):
    """Run Python with so much in /dev/shm."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if run("unshare", "-m", "sh", "-c", mount).returncode:
        pytest.skip("mounts need rights that this machine does not give")
    return run("unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, code)


needs_unshare = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and shutil.which("unshare")), reason="needs unshare, of Linux"
)


# --- shared memory ----------------------------------------------------------------------------------------------------


@needs_unshare
def test_a_container_with_little_shared_memory_is_refused():
    done = in_small_container("1m", program())
    assert done.returncode == 2, done.stderr
    assert "0 /dev/shm has 1.0 MiB free of 1.0 MiB, and batches in flight take up to 3.7 MiB" in done.stdout
    assert "--shm-size=1g" in done.stdout
    assert "train.num_workers=0" in done.stdout


@needs_unshare
def test_shared_memory_that_ends_later_is_told_by_the_worker():
    """What another program takes meanwhile is not known before; the worker's batch was dropped in silence."""
    done = in_small_container("2m", program(UNCHECKED))
    assert done.returncode == 2, done.stderr
    assert "a data-loading worker cannot send its batch" in done.stdout
    assert "No space left on device (28). /dev/shm has" in done.stdout
    assert "--shm-size=" in done.stdout


@needs_unshare
def test_a_container_with_enough_shared_memory_is_not_refused():
    code = program().replace("    held = []", "    held = __import__('collections').deque(maxlen=1)")
    done = in_small_container("6m", code)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("ranks", [1, 4])
def test_room_for_the_batches_of_all_ranks_is_asked_for(monkeypatch, ranks):
    monkeypatch.setattr(preflight.distributed, "local_world_size", lambda: ranks)
    enough = SimpleNamespace(f_bavail=5 * ranks, f_blocks=5 * ranks, f_frsize=1000)
    monkeypatch.setattr(preflight.sys, "platform", "linux")
    monkeypatch.setattr(preflight.os, "statvfs", lambda path: enough)
    preflight._require_shared_memory(NEEDS)
    enough.f_bavail = enough.f_blocks = 5 * ranks - 1
    with pytest.raises(DataError, match=r"/dev/shm has 0\.0 MiB free.*emptyDir.*train\.num_workers=0"):
        preflight._require_shared_memory(NEEDS)


def test_where_tensors_are_shared_elsewhere_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(preflight.sys, "platform", "darwin")
    monkeypatch.setattr(preflight.os, "statvfs", lambda path: pytest.fail("there is no /dev/shm"))
    preflight._require_shared_memory(NEEDS)


@pytest.mark.parametrize("photometry", [True, False])
def test_what_a_batch_takes_is_known_before_there_is_one(photometry):
    data = training_data([np.zeros((20, 20, 3), np.uint8)] * 40, batch_size=32)
    data.photometry = photometry
    batch = data[0]
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    more = [v for part in batch.photometry or () for v in vars(part).values() if isinstance(v, torch.Tensor)]
    needs = _needs(data, 2, 5)
    size = sum(tensor.nbytes for tensor in tensors)
    assert size / 1.05 < needs.batch_bytes <= size
    assert len(tensors) + len(more) <= needs.batch_tensors <= len(tensors) + len(more) + 2


def test_no_shared_memory_at_all(monkeypatch):
    def fail(self):
        raise RuntimeError("unable to open shared memory object </torch_1_2_0> in read-write mode: Read-only (30)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(DataError, match=r"cannot be given shared memory: unable to open.*train\.num_workers=0"):
        make_loader(training_data([np.zeros((20, 20, 3))] * 40), start_step=0, end_step=1, num_workers=1)


# --- file descriptors -------------------------------------------------------------------------------------------------

LIMIT = """
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + {soft}, used + {hard}))
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, of Linux")


@needs_proc
def test_few_descriptors_are_refused():
    done = run(sys.executable, "-c", program(LIMIT.format(soft=20, hard=40).strip()))
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("0 2 data workers need about ")
    assert "ulimit -n 4096" in done.stdout


@needs_proc
def test_a_soft_limit_is_raised():
    """Workers made all batches of an epoch with what they may open after that, and not with what they might before."""
    before = LIMIT.format(soft=20, hard=4000).strip()
    code = program(before).replace("    held = []", "    held = __import__('collections').deque(maxlen=1)")
    done = run(sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@needs_proc
@pytest.mark.parametrize("spare", [10, 16, 60])
def test_descriptors_that_run_out_later_are_told(spare):
    """While workers start, in a worker, and where batches arrive."""
    before = LIMIT.format(soft=spare, hard=spare).strip() + f"\n    {UNCHECKED}"
    done = run(sys.executable, "-c", program(before))
    assert done.returncode == 2, done.stderr
    assert "too many open files. Allow more (ulimit -n" in done.stdout
    assert "Exception ignored" not in done.stderr


def test_descriptors_of_a_process(monkeypatch):
    limits = [(100, 5000)]
    monkeypatch.setattr(preflight, "_open_descriptors", lambda: 50)
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda what, both: limits.append(both))
    monkeypatch.setattr(preflight.torch.multiprocessing, "get_sharing_strategy", lambda: "file_descriptor")
    preflight._require_descriptors(NEEDS)
    wanted = 50 + 2 * 4 + 5 * 5 + preflight._SPARE_DESCRIPTORS
    assert limits[-1] == (wanted, 5000)
    preflight._require_descriptors(NEEDS)
    assert len(limits) == 2  # enough
    limits.append((wanted - 1, wanted - 1))
    with pytest.raises(DataError, match=rf"need about {wanted} open files, and {wanted - 1} are allowed"):
        preflight._require_descriptors(NEEDS)
    monkeypatch.setattr(preflight.torch.multiprocessing, "get_sharing_strategy", lambda: "file_system")
    preflight._require_descriptors(NEEDS)  # no descriptor for each tensor


# --- the temporary folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def short_folder():
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.skipif(hasattr(preflight.util, "_get_base_temp_dir"), reason="this Python finds a shorter folder itself")
def test_a_long_temporary_folder(short_folder, monkeypatch):
    longest = preflight._SOCKET_PATH - len("/pymp-12345678/listener-12345678")
    fits = short_folder / ("x" * (longest - len(str(short_folder)) - 1))
    fits.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(fits))
    require_room(NEEDS)
    long = Path(f"{fits}y")
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(DataError, match=rf"{long} has {longest + 1} characters.*the folder {longest}\. Set TMPDIR"):
        require_room(NEEDS)
    assert list(long.iterdir()) == []


def test_a_temporary_folder_that_is_not_there(short_folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder / "gone"))
    with pytest.raises(DataError, match=rf"sockets in the temporary folder {short_folder}/gone.*No such file.*TMPDIR"):
        require_room(NEEDS)


def test_no_temporary_folder_at_all(monkeypatch):
    def fail():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    monkeypatch.setattr(preflight.util, "_get_base_temp_dir", lambda module: module.gettempdir(), raising=False)
    with pytest.raises(DataError, match=r"no temporary folder to write to.*No usable.*TMPDIR"):
        require_room(NEEDS)


def test_a_file_system_without_sockets(monkeypatch):
    class Trial:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def bind(self, path):
            raise OSError(95, "Operation not supported")

    monkeypatch.setattr(preflight.socket, "socket", lambda family: Trial())
    with pytest.raises(DataError, match="none can be made there: Operation not supported"):
        require_room(NEEDS)


def test_a_temporary_folder_that_goes_later(short_folder):
    code = program(f"import tempfile; tempfile.tempdir = {str(short_folder / 'gone')!r}; {UNCHECKED}")
    done = run(sys.executable, "-c", code)
    assert done.returncode == 2, done.stderr
    assert "a data-loading worker cannot send its batch: FileNotFoundError" in done.stdout
    assert "Set TMPDIR" in done.stdout


# --- scripts under spawn and forkserver -------------------------------------------------------------------------------

SCRIPT = """
import multiprocessing, os, pathlib, sys
multiprocessing.set_start_method(sys.argv[1], force=True)
import numpy as np
import dinoforge
from dinoforge.errors import DinoforgeError
from faults.test_images import SIZES

out = pathlib.Path(sys.argv[2])
{definitions}

def go():
    try:
        dinoforge.train(Images(), "small", out, **SIZES, **{{"train.num_workers": 2}})
    except DinoforgeError as error:
        sys.exit(f"error: {{error}}")
    finally:
        with open(f"{{out}}.ends", "a") as file:
            file.write("x")

{end}
"""
IMAGES = """
class Images:
    def __init__(self):
        self.large = os.urandom(500_000)  # more than a pipe takes at once
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return np.full((20, 20, 3), index, dtype=np.uint8)
"""
GUARDED = 'if __name__ == "__main__":\n    go()'


def script(folder, *, definitions=IMAGES, end=GUARDED):
    path = folder / "script.py"
    path.write_text(SCRIPT.format(definitions=definitions, end=end))
    return path


def files(run_folder):
    return {str(path.relative_to(run_folder)) for path in run_folder.rglob("*")}


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_without_main_guard_is_refused(tmp_path, method):
    done = run(sys.executable, str(script(tmp_path, end="go()")), method, str(tmp_path / "run"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: data workers are started by {method} here and import the script first")
    assert 'if __name__ == "__main__":  or set train.num_workers=0' in line
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert (tmp_path / "run.ends").read_text() == "x"  # not even the end of it ran in a worker
    assert not any("checkpoints/" in name for name in files(tmp_path / "run"))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_with_main_guard_trains(tmp_path, method):
    done = run(sys.executable, str(script(tmp_path)), method, str(tmp_path / "run"))
    assert (done.returncode, done.stderr) == (0, "")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == SIZES["train.steps"]


def test_a_class_inside_of_the_main_guard_is_named(tmp_path):
    inside = 'if __name__ == "__main__":' + IMAGES.replace("\n", "\n    ")
    done = run(sys.executable, str(script(tmp_path, definitions=inside)), "spawn", str(tmp_path / "run"))
    (line,) = done.stderr.splitlines()
    assert "which then lacks Images: move that out of  if __name__" in line


def test_a_script_that_fails_in_a_worker_is_told(tmp_path):
    broken = 'if __name__ != "__main__":\n    raise KeyError("HOME")' + IMAGES
    done = run(sys.executable, str(script(tmp_path, definitions=broken)), "spawn", str(tmp_path / "run"))
    *_, line = done.stderr.splitlines()
    assert "KeyError: 'HOME'" in done.stderr
    assert "first, which fails there (exit code 1): what is printed above says why" in line
    assert done.stderr.count("Traceback") == 1


def test_a_script_from_standard_input(tmp_path):
    text = script(tmp_path).read_text()
    done = run(sys.executable, "-", "spawn", str(tmp_path / "run"), input=text)
    (line,) = done.stderr.splitlines()
    assert "as when Python reads it from its standard input. Save it as a file, or set train.num_workers=0" in line


def test_a_class_of_python_c_or_a_notebook(tmp_path):
    """Workers import nothing then, so a folder of images needs no guard, and a class has no place to stand."""
    done = run(sys.executable, "-c", script(tmp_path, end="go()").read_text(), "spawn", str(tmp_path / "run"))
    (line,) = done.stderr.splitlines()
    assert "__main__.Images: it is defined in a notebook, a console or python -c, which no worker can import" in line
    with_list = "Images = lambda: [np.full((20, 20, 3), i, dtype=np.uint8) for i in range(40)]"
    text = script(tmp_path, definitions=with_list, end="go()").read_text()
    done = run(sys.executable, "-c", text, "spawn", str(tmp_path / "another"))
    assert (done.returncode, done.stderr) == (0, "")


# --- images that cannot be pickled ------------------------------------------------------------------------------------


class Holder:
    """Images with something in them."""

    def __init__(self, held):
        self.held = held

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return np.full((20, 20, 3), index, dtype=np.uint8)


class Refuses:
    def __reduce__(self):
        raise TypeError("h5py objects cannot be pickled")


@pytest.fixture
def spawning(monkeypatch):
    monkeypatch.setattr(preflight.multiprocessing, "get_start_method", lambda: "spawn")
    monkeypatch.setattr(preflight, "script_of_workers", lambda: None)


DEVNULL = open(os.devnull)  # noqa: SIM115


@pytest.mark.parametrize(
    ("held", "named"),
    [
        (lambda index: index, r"'held' of Holder is [\w.]+<lambda>: .*pickle"),
        (DEVNULL, r"'held' of Holder is a _io\.TextIOWrapper: cannot pickle"),
        (sqlite3.connect(":memory:"), r"'held' of Holder is a sqlite3\.Connection: cannot pickle"),
        (Refuses(), r"'held' of Holder is a [\w.]*test_containers\.Refuses: h5py objects cannot be pickled"),
        ((number for number in range(3)), r"'held' of Holder is a generator: cannot pickle"),
        ({"deep": [itertools.tee([])[0], lambda: 0]}, "pickle"),
    ],
    ids=["lambda", "file", "database", "h5py", "generator", "deep"],
)
def test_images_that_cannot_be_pickled_are_named(spawning, held, named):
    data = training_data(Holder(held), batch_size=4)
    with pytest.raises(DataError, match=named) as raised:
        make_loader(data, start_step=0, end_step=1, num_workers=1)
    assert "started by spawn" in str(raised.value)
    assert "opens its files in __getitem__, or set train.num_workers=0" in str(raised.value)


def test_what_workers_can_be_given(spawning):
    held = [torch.zeros(3), np.zeros(3), workers.multiprocessing.Lock(), len, Path("x"), {"a": Holder(1)}]
    require_sendable(Holder(held))


def test_where_workers_inherit_nothing_is_pickled(monkeypatch):
    monkeypatch.setattr(preflight.multiprocessing, "get_start_method", lambda: "fork")
    require_sendable(Holder(lambda: 0))


def test_a_process_that_may_have_no_workers(monkeypatch):
    monkeypatch.setattr(preflight.multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
    with pytest.raises(DataError, match=r"itself a worker.*train\.num_workers=0"):
        require_sendable(Holder(1))


# --- features ---------------------------------------------------------------------------------------------------------


def features_of(images):
    reading = {"size": 8, "channels": 3, "mean": [0.5], "std": [0.5], "num_workers": 1}
    return extract.extract(torch.nn.Identity(), open_source(images), range(40), **reading)


def test_features_name_what_workers_cannot_be_given(spawning):
    with pytest.raises(DataError, match=r"'held' of Holder is .*<lambda>.* or set num_workers=0"):
        features_of(Holder(lambda: 0))


def test_features_look_for_room(monkeypatch):
    def too_little(needs):
        assert (needs.workers, needs.batch_bytes, needs.key) == (1, 64 * 3 * 8 * 8, "num_workers")
        raise DataError("too little")

    monkeypatch.setattr(extract, "require_room", too_little)
    with pytest.raises(DataError, match="too little"):
        features_of(Holder(0))


class Deadly(Holder):
    def __getitem__(self, index):
        if workers.multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_features_tell_of_a_worker_that_was_killed():
    with pytest.raises(WorkerError, match=r"worker was killed.*use fewer num_workers"):
        features_of(Deadly(0))


# --- workers that are no more -----------------------------------------------------------------------------------------


def ended(code, *, place=(1234, 7), word=b""):
    """What the main process says of a worker that ended with an exit code."""
    crew = workers.Workers(Table(1))
    crew._processes = [SimpleNamespace(exitcode=code)]
    crew.table.places[0] = torch.tensor(place)
    crew.table.words[0, : len(word)] = torch.tensor(list(word), dtype=torch.uint8)
    return crew.failure(RuntimeError("exited unexpectedly"), lambda indices: f" at {indices}")


def test_how_a_worker_ended():
    killed = ended(-9)
    assert isinstance(killed, WorkerError)
    assert "killed at [7]" in str(killed)
    assert "ran out of shared memory" in str(ended(-7))
    assert "which then starts all over" in str(ended(preflight.UNGUARDED, place=(-1, -1)))
    assert "ended with exit code 3 before they began" in str(ended(3, place=(-1, -1)))
    assert "cannot send its batch: MemoryError: no. train.num_workers=0" in str(ended(1, word=b"MemoryError: no"))
