"""The machine and its software, and what a run would take of them."""

import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dinoforge.errors import RecipeError
from dinoforge.selfcheck.lines import Line, fail, guarded, judged, not_here, ok
from dinoforge.selfcheck.settings import Settings
from dinoforge.system.device import in_use, note_of_fallback, resolve_device, resolve_precision, usable_processors
from dinoforge.system.machine import free_memory
from dinoforge.version import __version__

_FLOAT32_ERROR = 1e-5  # relative, of a product's largest entry; TF32 gives 3e-4
_HEADS, _HEAD_DIM, _TOKENS = 6, 64, 197  # sizes of ViT-S at 224 pixels and patches of 16


def check(settings: Settings) -> Iterator[Line]:
    yield guarded("versions", _versions)
    yield guarded("machine", _machine)
    yield guarded("driver", _driver)
    yield guarded("GPUs", _gpus)
    try:
        device = resolve_device(settings.device)
    except RecipeError as error:
        yield fail("device", str(error))
        return
    yield guarded("device", partial(_device, settings.device, device))
    yield guarded("precision", partial(_precision, device))
    yield guarded("attention", partial(_attention, device))
    yield guarded("float32 products", partial(_float32, device))


def _versions() -> Line:
    found: dict[str, Any] = {"dinoforge": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.hip:
        found["rocm"] = torch.version.hip
    elif torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.backends.cudnn.is_available() and (cudnn := torch.backends.cudnn.version()):
        found["cudnn"] = cudnn
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        nccl: tuple[int, ...] = torch.cuda.nccl.version()
        found["nccl"] = ".".join(map(str, nccl))
    names = {"dinoforge": "dinoforge", "python": "Python", "torch": "PyTorch", "cuda": "CUDA", "rocm": "ROCm"}
    names |= {"cudnn": "cuDNN", "nccl": "NCCL"}
    return ok("versions", ", ".join(f"{names[key]} {value}" for key, value in found.items()), **found)


def _machine() -> Line:
    name = _processor_name()
    system = f"{platform.system()} {platform.release()}"
    memory = free_memory()
    free = "" if memory is None else f", {memory / 2**30:.1f} GiB of memory free"
    told = f"{system}, {name}, {usable_processors()} processors{free}"
    return ok("machine", told, system=system, processor=name, processors=usable_processors(), free_bytes=memory)


def _processor_name() -> str:
    """The system's name for the CPU."""
    try:
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (row.split(":", 1)[1].strip() for row in rows if row.startswith("model name"))
    return next(named, platform.machine())


def _driver() -> Line:
    told = _printed(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()
    if told:
        return ok("driver", f"NVIDIA {told[0].strip()}, of {len(told)} GPUs", driver=told[0].strip())
    file = Path("/proc/driver/nvidia/version")
    if file.exists():
        first = file.read_text(encoding="utf-8").splitlines()[0]
        return ok("driver", first, driver=first)
    if sys.platform == "darwin":
        return ok("driver", f"macOS {platform.mac_ver()[0]}", driver=platform.mac_ver()[0])
    return not_here("driver", "no NVIDIA driver: neither nvidia-smi nor /proc/driver/nvidia")


def _printed(command: list[str]) -> str:
    """The output of a program; '' where there is no such program or it does not answer."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _gpus() -> Line:
    if not torch.cuda.is_available():
        if torch.backends.mps.is_available():
            return ok("GPUs", "of this Mac, by MPS", gpus=["mps"])
        build = torch.version.hip or torch.version.cuda
        return not_here("GPUs", f"this PyTorch, built for {'GPUs' if build else 'CPUs alone'}, sees none", gpus=[])
    names = []
    for number in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(number)
        names.append(f"cuda:{number} {p.name}, capability {p.major}.{p.minor}, {p.total_memory / 2**30:.1f} GiB")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    details = (f"CUDA_VISIBLE_DEVICES={hidden}",) if hidden is not None else ()
    return ok("GPUs", "; ".join(names), details, gpus=names)


def _device(name: str, device: torch.device) -> Line:
    why = "by auto: CUDA, then MPS, then the CPU" if name == "auto" else "as asked"
    note = note_of_fallback(name, device)
    why += f". It {note}" if note else ""
    # Something is computed: a driver may list a device that does not work, or that this build has no kernels for.
    with in_use(device):
        total = float(torch.arange(1000.0, device=device).sum())
    return judged(total == 499_500, "device", f"{device}, {why}", device=str(device), why=why)


def _precision(device: torch.device) -> Line:
    dtype = str(resolve_precision("auto", device)).removeprefix("torch.")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        why = f"capability {major}.{minor}: bfloat16 from 8.0, float16 from 7.0, else float32"
    elif device.type == "cpu":
        why = f"bfloat16 where the CPU has AMX or AVX-512 BF16; this one {'has' if dtype == 'bfloat16' else 'has not'}"
    else:
        why = f"always on {device.type}"
    return ok("precision", f"{dtype} ({why})", precision=dtype, why=why)


def _attention(device: torch.device) -> Line:
    dtype = resolve_precision("auto", device)
    if device.type == "cpu":
        half = dtype.itemsize == 2
        kind = "products in half precision, a few images at a time" if half else "PyTorch's flash attention for CPUs"
        return ok("attention", f"{kind} (dinoforge.kernels.attention)", backend="cpu half" if half else "cpu flash")
    q = torch.randn(2, _HEADS, _TOKENS, _HEAD_DIM, device=device, dtype=dtype)
    backend = "unknown"
    choose: Callable[..., int] | None = getattr(torch, "_fused_sdp_choice", None)
    if choose is not None:
        with suppress(RuntimeError):  # not every kind of device has it
            backend = _backend_name(choose(q, q, q))
    given = F.scaled_dot_product_attention(q, q, q).float().cpu()
    q = q.float().cpu()
    by_hand = torch.softmax(q @ q.mT / _HEAD_DIM**0.5, dim=-1) @ q
    error = float((given - by_hand).norm() / by_hand.norm())
    refused = () if backend in ("flash", "cudnn") else _why_no_flash(torch.randn_like(q, device=device, dtype=dtype))
    text = f"{backend}, for {_HEADS} heads of {_HEAD_DIM} in {str(dtype).removeprefix('torch.')}: error {error:.1e}"
    bound = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    return judged(error < bound, "attention", f"{text} (bound {bound:g})", refused, backend=backend, error=error)


def _backend_name(number: int) -> str:
    """The backend that PyTorch's attention chose."""
    names: dict[str, Any] = getattr(torch.nn.attention.SDPBackend, "__members__", {})
    named = {int(value): name.lower().removesuffix("_attention") for name, value in names.items()}
    return named.get(number, f"number {number}")


def _why_no_flash(q: torch.Tensor) -> tuple[str, ...]:
    """PyTorch's own words on why flash attention is not taken."""
    parameters, can_use = (
        getattr(torch.backends.cuda, name, None) for name in ("SDPAParams", "can_use_flash_attention")
    )
    if q.device.type != "cuda" or parameters is None or can_use is None:
        return ()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            can_use(parameters(q, q, q, None, 0.0, False, False), True)
        except TypeError:  # another version's arguments
            return ()
    return tuple(f"not flash: {str(warning.message).splitlines()[0]}" for warning in told[:3])


def _float32(device: torch.device) -> Line:
    """Whether products and convolutions are those of float32, and not of TF32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        a, b = torch.randn(512, 512), torch.randn(512, 512)
        images, kernel = torch.randn(4, 3, 64, 64), torch.randn(64, 3, 16, 16)
    wanted = [a.double() @ b.double(), F.conv2d(images.double(), kernel.double(), stride=16)]
    with in_use(device):
        a, b, images, kernel = (x.to(device) for x in (a, b, images, kernel))
        given = [(a @ b).cpu(), F.conv2d(images, kernel, stride=16).cpu()]
    errors = [float((x - y).abs().max() / y.abs().max()) for x, y in zip(given, wanted, strict=True)]
    text = f"relative error {errors[0]:.1e}, of convolutions {errors[1]:.1e} (bound {_FLOAT32_ERROR:g}; TF32: 3e-4)"
    passed = max(errors) < _FLOAT32_ERROR
    return judged(passed, "float32 products", text, product=errors[0], convolution=errors[1])
