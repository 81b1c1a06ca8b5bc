"""Which device is taken, in which precision, and with what beside it; no GPU is needed."""

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dinoforge.errors import RecipeError
from dinoforge.system import device as devices
from dinoforge.system import machine

CPU, MPS, CUDA = torch.device("cpu"), torch.device("mps"), torch.device("cuda")
GIB = 2**30


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher, and nothing said about GPUs in the environment."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back even where a test sets it by itself
        monkeypatch.delenv(name)


def gpus(monkeypatch, count: int, capability: tuple[int, int] = (8, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def no_gpu(monkeypatch, reason: str = "No CUDA GPUs are available", build: str | None = "12.8") -> None:
    gpus(monkeypatch, 0)

    def init() -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)


def rank(monkeypatch, local: int, of: int, *, all_ranks: int | None = None) -> None:
    said = {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": of, "WORLD_SIZE": all_ranks or of, "RANK": local}
    for name, value in said.items():
        monkeypatch.setenv(name, str(value))


# Which device


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch):
    no_gpu(monkeypatch)
    assert devices.resolve_device("auto") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.resolve_device("auto") == MPS
    gpus(monkeypatch, 1)
    assert devices.resolve_device("auto") == CUDA


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_rank_takes_the_gpu_of_its_number(monkeypatch, name):
    gpus(monkeypatch, 4)
    for local in range(4):
        rank(monkeypatch, local, 4)
        assert devices.rank_device(name) == torch.device("cuda", local)


def test_a_rank_that_sees_one_gpu_takes_it_whatever_its_number(monkeypatch):
    """Slurm's ``--gpus-per-task`` shows each task its own as number 0."""
    gpus(monkeypatch, 1)
    rank(monkeypatch, 3, 4)
    assert devices.rank_device("auto") == devices.rank_device("cuda:0") == torch.device("cuda", 0)


def test_a_numbered_gpu_for_several_ranks_is_refused(monkeypatch):
    gpus(monkeypatch, 2)
    rank(monkeypatch, 0, 2)
    with pytest.raises(RecipeError, match=r"device=cuda:1 would put all 2 ranks .* on one GPU: set device=cuda"):
        devices.rank_device("cuda:1")
    # A launcher that says nothing of the machine: rank 1 of a machine is not alone there.
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RecipeError, match="would put all 2 ranks"):
        devices.rank_device("cuda:1")


def test_a_numbered_gpu_of_one_rank_is_taken(monkeypatch):
    gpus(monkeypatch, 2)
    assert devices.rank_device("cuda:1") == torch.device("cuda", 1)
    rank(monkeypatch, 0, 1, all_ranks=4)  # one on each of four machines
    assert devices.rank_device("cuda:1") == torch.device("cuda", 1)


def test_fewer_gpus_than_ranks_are_refused(monkeypatch):
    gpus(monkeypatch, 2)
    rank(monkeypatch, 2, 3)
    with pytest.raises(RecipeError, match="3 ranks on a machine with 2 GPUs"):
        devices.rank_device("auto")


def test_ranks_do_not_share_the_gpu_of_a_mac(monkeypatch):
    no_gpu(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.rank_device("auto") == MPS
    rank(monkeypatch, 0, 2)
    assert devices.rank_device("cpu") == CPU
    for name in ("auto", "mps"):
        with pytest.raises(RecipeError, match="start one process, or set device=cpu"):
            devices.rank_device(name)


@pytest.mark.parametrize(
    ("count", "said"), [(2, "device=cuda:5: there are 2 GPUs; the first is cuda:0"), (1, "there is one GPU")]
)
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, count, said):
    gpus(monkeypatch, count)
    with pytest.raises(RecipeError, match=said):
        devices.resolve_device("cuda:5")


# Why there is none


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("Found no NVIDIA driver on your system. Please check", "No NVIDIA driver is found; install one"),
        ("The NVIDIA driver on your system is too old (found version 11040).", r"too old .* Or take a PyTorch built"),
        ("No CUDA GPUs are available", "No CUDA GPUs are available; nvidia-smi shows"),
    ],
)
def test_cuda_that_cannot_be_had_says_why(monkeypatch, reason, said):
    no_gpu(monkeypatch, reason)
    with pytest.raises(RecipeError, match=f"device=cuda is not available here: this PyTorch sees cpu. .*{said}"):
        devices.resolve_device("cuda")


def test_gpus_that_are_hidden_are_said_to_be(monkeypatch):
    no_gpu(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(RecipeError, match="CUDA_VISIBLE_DEVICES=-1 hides every GPU"):
        devices.resolve_device("cuda")


def test_mps_that_cannot_be_had_says_why(monkeypatch):
    no_gpu(monkeypatch)
    with pytest.raises(RecipeError, match="built without MPS"):
        devices.resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    with pytest.raises(RecipeError, match="macOS 14"):
        devices.resolve_device("mps")


def pci(root: Path, *cards: tuple[str, str]) -> Path:
    for number, (vendor, kind) in enumerate(cards):
        folder = root / f"sys/bus/pci/devices/0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")
    return root


@pytest.mark.parametrize(
    ("cards", "there"),
    [
        ((), False),
        ((("0x8086", "0x030000"), ("0x1002", "0x030000")), False),  # Intel's and AMD's graphics
        ((("0x10de", "0x040300"), ("0x10de", "0x068000")), False),  # NVIDIA's sound, and a switch between GPUs
        ((("0x8086", "0x060000"), ("0x10de", "0x030000")), True),
        ((("0x10de", "0x030200"),), True),  # without a display
    ],
)
def test_nvidia_hardware_is_known_by_its_class(monkeypatch, tmp_path, cards, there):
    monkeypatch.setattr(torch.version, "hip", None)
    assert devices.has_gpu(pci(tmp_path, *cards)) is there


@pytest.mark.parametrize("path", ["proc/driver/nvidia/version", "usr/lib/wsl/lib/libcuda.so.1"])
def test_a_driver_means_hardware(tmp_path, path):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).touch()
    assert devices.has_gpu(tmp_path)


def test_a_pytorch_for_amd_looks_for_amd(monkeypatch, tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    monkeypatch.setattr(torch.version, "hip", None)
    assert not devices.has_gpu(tmp_path)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert devices.has_gpu(tmp_path)


def test_falling_back_to_the_cpu_is_told_with_its_reason(monkeypatch):
    no_gpu(monkeypatch, "Found no NVIDIA driver on your system.")
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    note = devices.note_of_fallback("auto", CPU)
    assert note is not None
    assert note.startswith("computes on the CPU, although there is a GPU: no NVIDIA driver is found; install one")
    assert note.endswith("device=cpu, if the CPU is meant")


def test_a_pytorch_without_cuda_beside_a_gpu_is_told(monkeypatch):
    no_gpu(monkeypatch, build=None)
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    note = devices.note_of_fallback("auto", CPU)
    assert note is not None
    assert "is built without CUDA; https://pytorch.org" in note


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere no hardware is looked for")
def test_where_there_is_no_gpu_the_note_is_short(monkeypatch):
    no_gpu(monkeypatch)
    monkeypatch.setattr(devices, "has_gpu", lambda: False)
    said = "computes on the CPU: this PyTorch is built for CUDA 12.8, but there is no NVIDIA GPU here"
    assert devices.note_of_fallback("auto", CPU) == said
    monkeypatch.setattr(torch.version, "hip", "6.4")
    said = "computes on the CPU: this PyTorch is built for ROCm 6.4, but there is no AMD GPU here"
    assert devices.note_of_fallback("auto", CPU) == said


def test_what_was_meant_is_not_told(monkeypatch):
    no_gpu(monkeypatch)
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    assert devices.note_of_fallback("cpu", CPU) is None
    assert devices.note_of_fallback("auto", CUDA) is None
    assert devices.note_of_fallback("auto", MPS) is None
    monkeypatch.setattr(devices, "has_gpu", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert devices.note_of_fallback("auto", CPU) is None  # a PyTorch for CPUs, where there is nothing else


def test_idle_gpus_are_told(monkeypatch):
    gpus(monkeypatch, 8)
    said = "1 of 8 GPUs is used: start with --nproc auto to use all, or choose one by device=cuda:N"
    assert devices.note_of_idle_gpus("auto", CUDA) == devices.note_of_idle_gpus("cuda", CUDA) == said
    assert devices.note_of_idle_gpus("cuda:3", torch.device("cuda:3")) is None
    assert devices.note_of_idle_gpus("cpu", CPU) is None
    rank(monkeypatch, 0, 2)
    assert devices.note_of_idle_gpus("auto", torch.device("cuda:0")) == (
        "2 of 8 GPUs are used: start 8 ranks to use all"
    )
    rank(monkeypatch, 0, 8)
    assert devices.note_of_idle_gpus("auto", torch.device("cuda:0")) is None
    gpus(monkeypatch, 1)
    assert devices.note_of_idle_gpus("auto", CUDA) is None


# In which precision


@pytest.mark.parametrize(
    ("capability", "alone", "sharded"),
    [
        ((6, 1), torch.float32, torch.float32),
        ((7, 0), torch.float16, torch.float32),
        ((7, 5), torch.float16, torch.float32),
        ((8, 0), torch.bfloat16, torch.bfloat16),
        ((9, 0), torch.bfloat16, torch.bfloat16),
        ((12, 0), torch.bfloat16, torch.bfloat16),
    ],
)
def test_auto_takes_what_the_gpu_multiplies_fastest(monkeypatch, capability, alone, sharded):
    gpus(monkeypatch, 1, capability)
    assert devices.resolve_precision("auto", CUDA) is alone
    assert devices.resolve_precision("auto", CUDA, sharded=True) is sharded


def test_a_given_precision_is_taken(monkeypatch):
    gpus(monkeypatch, 1, (7, 5))
    assert devices.resolve_precision("fp32", CUDA) is torch.float32
    assert devices.resolve_precision("bf16", CUDA, sharded=True) is torch.bfloat16
    assert devices.resolve_precision("auto", MPS) is torch.float32
    with pytest.raises(RecipeError, match="fp16 cannot be sharded"):
        devices.resolve_precision("fp16", CUDA, sharded=True)


def test_float16_on_mps_needs_a_scaler_without_float64(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0"))
    assert devices.resolve_precision("fp16", MPS) is torch.float16
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.7.1"))
    with pytest.raises(RecipeError, match=r"needs PyTorch 2\.9, this one is 2\.7\.1"):
        devices.resolve_precision("fp16", MPS)
    assert devices.resolve_precision("fp16", CUDA) is torch.float16


# While it is used


@pytest.fixture
def current(monkeypatch) -> Iterator[list[object]]:
    """The devices that are current, the innermost last; TF32 settings are afterwards PyTorch's defaults."""
    stack: list[object] = []

    @contextlib.contextmanager
    def device(which: object) -> Iterator[None]:
        stack.append(which)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    before = tf32()
    yield stack
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    if newer():
        backends = torch.backends
        for backend in (backends, backends.cudnn, backends.cuda.matmul, backends.mkldnn.matmul):
            backend.fp32_precision = "none"
        backends.cudnn.conv.fp32_precision = backends.cudnn.rnn.fp32_precision = "tf32"
    assert tf32() == before


def newer() -> bool:
    """Whether this PyTorch has the second set of settings."""
    return hasattr(torch.backends.cuda.matmul, "fp32_precision")


def tf32() -> dict[str, object]:
    """Everything that says whether TF32 is allowed."""

    def read(get):
        try:
            return get()
        except RuntimeError:
            return "contradictory"

    settings = {
        "products": read(lambda: torch.backends.cuda.matmul.allow_tf32),
        "convolutions": read(lambda: torch.backends.cudnn.allow_tf32),
        "on the CPU, too": read(torch.get_float32_matmul_precision),
    }
    if newer():
        kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
        settings["newer"] = [kind.fp32_precision for kind in (*kinds, torch.backends.mkldnn.matmul)]
    return settings


def allowed() -> tuple[bool, bool]:
    """Whether products and whether convolutions may use TF32; both sets of settings agree."""
    either = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if newer():
        kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
        assert either == tuple(kind.fp32_precision == "tf32" for kind in kinds)
    return either


SETTINGS = {
    "as PyTorch is": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "none at all": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
}
if newer():
    SETTINGS |= {
        "convolutions of float32": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
        "TF32 for all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        "TF32 for all of CUDA, and nothing else said": lambda: (
            setattr(torch.backends.cudnn, "fp32_precision", "tf32"),
            setattr(torch.backends.cudnn.conv, "fp32_precision", "none"),
        ),
    }


@pytest.mark.parametrize("before", SETTINGS)
def test_float32_is_float32_unless_tf32_is_allowed(current, before):
    SETTINGS[before]()
    found = tf32()
    with devices.in_use(CUDA):
        assert allowed() == (False, False)
        torch.get_float32_matmul_precision()  # which torch.compile asks, does not raise
        with devices.in_use(CUDA, allow_tf32=True):
            assert allowed() == (True, True)
            torch.get_float32_matmul_precision()
        assert allowed() == (False, False)
    assert tf32() == found


def test_settings_are_put_back_after_an_error(current):
    found = tf32()
    with pytest.raises(ZeroDivisionError), devices.in_use(CUDA):
        raise ZeroDivisionError
    assert tf32() == found


def test_a_gpu_in_use_is_the_current_one(current):
    with devices.in_use(torch.device("cuda:1")):
        assert current == [torch.device("cuda:1")]
    assert current == []


@pytest.mark.parametrize("device", [CPU, MPS])
def test_on_other_devices_nothing_is_set(current, device):
    found = tf32()
    with devices.in_use(device):
        assert tf32() == found
        assert current == []


# The allocator


class Driver:
    """Of CUDA: what it says about attributes, by number."""

    def __init__(self, attributes: dict[int, int], error: int = 0) -> None:
        self.attributes, self.error = attributes, error
        self.cuInit = lambda flags: error
        self.cuDeviceGet = self.device_get

    def device_get(self, where, index: int) -> int:
        where._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, where, attribute: int, number: ctypes.c_int) -> int:
        if number.value != 1:
            return 101  # no such device
        where._obj.value = self.attributes.get(attribute, 0)
        return 0


def driver(monkeypatch, attributes: dict[int, int], *, error: int = 0, release: str = "6.8.0-generic") -> None:
    libraries = vars(ctypes) | {"CDLL": lambda name: Driver(attributes, error)}
    monkeypatch.setattr(devices, "ctypes", SimpleNamespace(**libraries))
    monkeypatch.setattr(devices.platform, "release", lambda: release)
    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)


def test_blocks_are_made_to_grow(monkeypatch):
    driver(monkeypatch, {102: 1, 103: 1})
    assert devices.allocator_settings() is None
    devices.use_expandable_segments(torch.device("cuda:1"))
    assert devices.allocator_settings() == "expandable_segments:True"
    # PyTorch 2.7 knows one name, PyTorch 2.9 warns of it unless the other is there.
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_what_the_user_set_for_the_allocator_stays(monkeypatch, variable):
    driver(monkeypatch, {102: 1, 103: 1})
    monkeypatch.setenv(variable, "max_split_size_mb:128")
    devices.use_expandable_segments(torch.device("cuda:1"))
    assert devices.allocator_settings() == "max_split_size_mb:128"
    assert sum("ALLOC_CONF" in name for name in os.environ) == 1


@pytest.mark.parametrize(
    "without",
    [
        {"attributes": {102: 0, 103: 1}},  # some virtual GPUs
        {"attributes": {102: 1, 103: 0}},  # Jetson
        {"attributes": {102: 1, 103: 1}, "release": "5.15.153.1-microsoft-standard-WSL2"},
        {"attributes": {102: 1, 103: 1}, "error": 100},
    ],
)
def test_a_driver_that_cannot_let_blocks_grow_is_not_asked_to(monkeypatch, without):
    driver(monkeypatch, **without)
    devices.use_expandable_segments(torch.device("cuda:1"))
    assert devices.allocator_settings() is None


def test_blocks_do_not_grow_elsewhere(monkeypatch):
    driver(monkeypatch, {102: 1, 103: 1})
    devices.use_expandable_segments(CPU)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # the environment has been read
    devices.use_expandable_segments(torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm
    devices.use_expandable_segments(torch.device("cuda:1"))
    assert devices.allocator_settings() is None


def test_without_a_driver_blocks_do_not_grow(monkeypatch):
    driver(monkeypatch, {})

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(devices, "ctypes", SimpleNamespace(**vars(ctypes) | {"CDLL": missing}))
    devices.use_expandable_segments(torch.device("cuda:1"))
    assert devices.allocator_settings() is None


@pytest.mark.processes
def test_pytorch_takes_the_setting_after_it_was_imported():
    """It reads the environment when it first asks for memory of a GPU; that this is so shows without one."""
    code = (
        "import torch\n"
        "from dinoforge.system import device as devices\n"
        "devices._maps_memory = lambda device: True\n"
        "torch.zeros(10)\n"
        "devices.use_expandable_segments(torch.device('cuda'))\n"
        "get = getattr(torch.cuda.memory, '_snapshot', None)\n"
        "settings = get().get('allocator_settings', {}) if get and torch.backends.cuda.is_built() else {}\n"
        "print(settings.get('expandable_segments', 'cannot tell'))"
    )
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    if child.stdout.strip() == "cannot tell":
        pytest.skip("this PyTorch does not tell its allocator's settings without a GPU")
    assert (child.stdout, child.stderr) == ("True\n", "")


# Beside it


@pytest.mark.parametrize(
    ("device", "processors", "wanted", "workers", "threads"),
    [
        (CPU, 1, None, 1, 1),
        (CPU, 8, None, 4, 8),
        (CPU, 64, None, 8, 64),
        (CUDA, 1, None, 1, 1),
        (CUDA, 2, None, 1, 1),
        (CUDA, 16, None, 15, 1),
        (CUDA, 33, None, 32, 1),
        (CUDA, 35, None, 32, 3),
        (CUDA, 128, None, 32, 4),
        (MPS, 10, None, 9, 1),
        (CUDA, 16, 10, 10, 1),
        (CUDA, 64, 40, 40, 4),  # the user's
        (CUDA, 4, 10, 4, 1),
        (CUDA, 16, 0, 0, 1),
        (CPU, 8, 0, 0, 8),
        (CPU, 2, 10, 2, 2),
    ],
)
def test_workers_and_threads_share_the_processors(device, processors, wanted, workers, threads):
    assert devices.loader_workers(device, processors, wanted) == workers
    assert devices.compute_threads(device, processors, None) == threads
    assert devices.compute_threads(device, processors, 6) == 6


def test_ranks_share_processors_and_memory(monkeypatch):
    monkeypatch.setattr(machine, "processors", lambda: 16)
    monkeypatch.setattr(machine, "free_memory", lambda: 32 * GIB)
    assert devices.usable_processors() == 16
    assert devices.free_memory(CPU) == 32 * GIB
    rank(monkeypatch, 0, 4)
    assert devices.usable_processors() == 4
    assert devices.free_memory(CPU) == 8 * GIB
    monkeypatch.setattr(machine, "free_memory", lambda: None)
    assert devices.free_memory(CPU) is None


def test_a_gpu_has_free_what_pytorch_keeps_for_later(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * GIB)
    assert devices.free_memory(CUDA) == 12 * GIB

    def refuse(device: torch.device) -> None:
        raise RuntimeError("operation not supported")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    assert devices.free_memory(CUDA) is None


def test_a_mac_has_free_what_metal_recommends(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2 * GIB)
    assert devices.free_memory(MPS) == 10 * GIB
    monkeypatch.delattr(torch.mps, "recommended_max_memory")
    assert devices.free_memory(MPS) is None


@pytest.mark.processes
def test_peak_memory_is_this_processs_and_not_its_parents():
    large = np.ones(2**27)  # 1 GiB that a child begins with as its ru_maxrss
    code = (
        "import torch; from dinoforge.system.device import peak_memory_gib;print(peak_memory_gib(torch.device('cpu')))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert large.nbytes == 2**30
    assert 0 < float(child.stdout) < 0.95
