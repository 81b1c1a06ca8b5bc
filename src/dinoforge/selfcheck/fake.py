"""An accelerator that is not there, for machines without one.

Its tensors say that they are on a device of another type, and hold their values in main memory. So everything that is
done to them takes the branches of an accelerator and gives real numbers, and what a real one would refuse is refused:
operands on two devices, and if asked float64, as on MPS. It counts what costs a real one time: the moments at which
the host waits for the device, copies from memory that is not page-locked, kernels, bytes.

The type, ``lazy``, is one that PyTorch knows and that nothing else here uses. What PyTorch lists by device is taught
about it for as long as the accelerator is there: autocast, fused and foreach optimizers, page-locked memory.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Self, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dinoforge.system import device as devices
from dinoforge.system import transfer

DEVICE = torch.device("lazy:0")

_CPU = torch.device("cpu")
_HERE = str(Path(__file__).parent)
_PACKAGE = str(Path(__file__).parent.parent)

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_WAITS = {
    _aten._local_scalar_dense.default: "item",
    _aten.nonzero.default: "nonzero",
    _aten.masked_select.default: "masked_select",
    _aten.equal.default: "equal",
    _aten._unique2.default: "unique",
    _aten.is_nonzero.default: "bool",
}
# What autocast computes in half precision, as far as the package calls it.
_IN_HALF = {
    F.linear,
    F.conv2d,
    F.scaled_dot_product_attention,
    torch.mm,
    torch.addmm,
    torch.bmm,
    torch.matmul,
    torch.conv2d,
    Tensor.mm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
}


_OPTIMIZERS = [_foreach_utils, *(import_module(f"torch.optim.{name}") for name in ("optimizer", "adam", "adamw"))]


class DeviceMismatchError(RuntimeError):
    """An operation whose operands are on two devices."""


@dataclass
class Counts:
    """What was asked of the accelerator, counted.

    Args:
        waits: Moments at which the host waited for the device: the reason, and the line of the package.
        pageable: Copies to the device from memory that is not page-locked: bytes, and the line of the package.
        kernels: Number of operations that are not views.
        traffic: Bytes that these operations read and wrote.
        operations: Names of all operations, views too.
    """

    waits: list[tuple[str, str]] = field(default_factory=list)
    pageable: list[tuple[int, str]] = field(default_factory=list)
    kernels: int = 0
    traffic: int = 0
    operations: set[str] = field(default_factory=set)

    def clear(self) -> None:
        """Count from zero again."""
        self.waits.clear()
        self.pageable.clear()
        self.operations.clear()
        self.kernels = self.traffic = 0


class _OnDevice(Tensor):
    """A tensor of the accelerator; ``held`` has its values, in main memory."""

    held: Tensor
    accelerator: "_Accelerator"

    @staticmethod
    def __new__(cls, held: Tensor, accelerator: "_Accelerator") -> "_OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        made.held, made.accelerator = held.detach(), accelerator
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method here, of Tensor's, too
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        flat, _ = tree_flatten((args, kwargs or {}))
        (first, *_) = (x for x in flat if isinstance(x, _OnDevice))
        return first.accelerator.call(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.held!r} on {DEVICE}"


@dataclass
class _Accelerator:
    """Does on main memory what is asked of the device, and counts.

    Args:
        float64: Whether the device has float64.
    """

    float64: bool
    counts: Counts = field(default_factory=Counts)
    half: list[torch.dtype | None] = field(default_factory=lambda: [None])  # innermost autocast last; None: none
    pinned: set[int] = field(default_factory=set)  # addresses of page-locked memory
    keep: list[Tensor] = field(default_factory=list)  # so that no other memory gets such an address

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of an operation, on the device where its operands are or where it was asked for."""
        flat, _ = tree_flatten((args, kwargs)) if kwargs else tree_flatten(args)
        tensors = [x for x in flat if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, _OnDevice)]
        if func in (_aten._pin_memory.default, _aten.is_pinned.default):
            return self._pin(func, tensors[0])
        asked = kwargs.get("device")
        to_device = bool(ours) if asked is None else torch.device(asked).type == DEVICE.type
        if func is _aten.copy_.default:
            to_device = isinstance(args[0], _OnDevice)
        if not (ours or to_device):
            return func(*args, **kwargs)
        self.counts.operations.add(func.name())
        self._check(func, tensors, ours)
        self._count(func, args, kwargs, ours, to_device)

        def held(x: Any) -> Any:
            return x.held if isinstance(x, _OnDevice) else x

        known = {id(x.held): x for x in ours}
        settings = dict(kwargs) | ({} if asked is None else {"device": _CPU})
        if func is _aten._to_copy.default:
            settings.pop("non_blocking", None)
        result = func(*tree_map(held, tuple(args)), **tree_map(held, settings))
        if func is _aten.copy_.default:
            return args[0]

        def placed(x: Any) -> Any:
            if not isinstance(x, Tensor) or not to_device:
                return x
            if x.dtype is torch.float64 and not self.float64:
                raise TypeError(f"the accelerator has no float64, which {func} makes")
            return known.get(id(x)) if id(x) in known else _OnDevice(x, self)

        placed_result = tree_map(placed, result)
        if not getattr(func, "is_view", False):
            moved, _ = tree_flatten(result)
            self.counts.kernels += 1
            self.counts.traffic += sum(x.nbytes for x in [*ours, *moved] if isinstance(x, Tensor))
        return placed_result

    def _check(self, func: Any, tensors: Sequence[Tensor], ours: Sequence[Tensor]) -> None:
        # A number on the CPU, that is a tensor without dimensions, may go into any operation.
        if func not in _COPIES and len(ours) < sum(isinstance(x, _OnDevice) or x.dim() > 0 for x in tensors):
            raise DeviceMismatchError(
                f"{func}: expected all tensors on one device, got {DEVICE} and cpu, at {_line_of_the_package()}"
            )

    def _count(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], ours: Sequence[Tensor], to_device: bool
    ) -> None:
        reason = _WAITS.get(func)
        if func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default):
            if any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                reason = "index by a mask"
        elif func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            reason = "repeat_interleave"
        elif func in _COPIES:
            source = args[1] if func is _aten.copy_.default else args[0]
            if isinstance(source, _OnDevice) and not to_device:
                reason = "copy to main memory"
            elif not isinstance(source, _OnDevice) and to_device:
                if source.untyped_storage().data_ptr() not in self.pinned:
                    self.counts.pageable.append((source.nbytes, _line_of_the_package()))
                non_blocking = args[2] if func is _aten.copy_.default and len(args) > 2 else kwargs.get("non_blocking")
                if not non_blocking:
                    reason = "blocking copy to the device"
        if reason is not None:
            self.counts.waits.append((reason, _line_of_the_package()))

    def _pin(self, func: Any, x: Tensor) -> Any:
        if func is _aten.is_pinned.default:
            return not isinstance(x, _OnDevice) and x.untyped_storage().data_ptr() in self.pinned
        locked = x.clone()
        self.pinned.add(locked.untyped_storage().data_ptr())
        self.keep.append(locked)
        return locked


class _Dispatch(TorchDispatchMode):
    """Sees what makes tensors on the device out of nothing, or out of those in main memory."""

    def __init__(self, accelerator: _Accelerator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._accelerator = accelerator

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._accelerator.call(func, args, kwargs or {})


class _Autocasting(TorchFunctionMode):
    """Multiplies float32 tensors of the device in half precision where autocast is on."""

    def __init__(self, accelerator: _Accelerator) -> None:
        super().__init__()
        self._accelerator = accelerator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        settings = dict(kwargs or {})
        if func is Tensor.new_tensor:
            like, *args = args
            settings = {"dtype": like.dtype, "device": like.device} | settings
            func = torch.tensor
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            # PyTorch makes it without asking a dispatch mode. On a real device, too, it is made here and copied.
            device = settings.pop("device", None)
            made = func(*args, **settings)
            return made if device is None else made.to(device)
        if func is Tensor.tolist and isinstance(args[0], _OnDevice):
            return args[0].cpu().tolist()
        half = self._accelerator.half[-1]
        if half is None or func not in _IN_HALF:
            return func(*args, **settings)

        def cast_down(x: Any) -> Any:
            return x.to(half) if isinstance(x, _OnDevice) and x.dtype is torch.float32 else x

        return func(*tree_map(cast_down, tuple(args)), **tree_map(cast_down, settings))


@contextmanager
def fake_accelerator(*, float64: bool = True, found: bool = False) -> Iterator[Counts]:
    """Let tensors be put on ``DEVICE`` meanwhile; yields what is counted.

    Args:
        float64: Whether the device has float64; MPS has not.
        found: Whether ``device=auto`` takes the device.
    """
    import_module("torch._dynamo")  # which recomputing imports, and which would take what is patched here for PyTorch's
    accelerator = _Accelerator(float64)
    resolve = devices.resolve_device

    def resolve_device(name: str) -> torch.device:
        return DEVICE if name == "auto" else resolve(name)

    original = torch.autocast

    class Autocast(original):  # type: ignore[misc, valid-type]
        """PyTorch's autocast, which also knows the device."""

        def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **more: Any):
            self._ours = device_type == DEVICE.type
            if self._ours:
                self._half = (dtype or torch.bfloat16) if enabled else None
                # In a backward pass, where what was not kept is computed again, PyTorch has left the others.
                self._casting = _Autocasting(accelerator)
            else:
                super().__init__(device_type, dtype, enabled, **more)

        def __enter__(self) -> Self:
            if self._ours:
                accelerator.half.append(self._half)
                self._casting.__enter__()  # type: ignore[no-untyped-call]
                return self
            return cast(Self, super().__enter__())

        def __exit__(self, *error: Any) -> Any:
            if not self._ours:
                return super().__exit__(*error)
            self._casting.__exit__(*error)  # type: ignore[no-untyped-call]
            accelerator.half.pop()
            return None

    is_enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype
    is_available = torch.amp.is_autocast_available

    def is_autocast_available(device_type: str) -> bool:
        return device_type == DEVICE.type or is_available(device_type)

    def is_autocast_enabled(device_type: str = "cuda") -> bool:
        return accelerator.half[-1] is not None if device_type == DEVICE.type else is_enabled(device_type)

    def get_autocast_dtype(device_type: str) -> torch.dtype:
        return accelerator.half[-1] or torch.bfloat16 if device_type == DEVICE.type else dtype_of(device_type)

    with ExitStack() as stack:
        stack.enter_context(patch.object(transfer, "PAGE_LOCKED", transfer.PAGE_LOCKED | {DEVICE.type}))
        for name, value in {
            "autocast": Autocast,
            "is_autocast_enabled": is_autocast_enabled,
            "get_autocast_dtype": get_autocast_dtype,
        }.items():
            stack.enter_context(patch.object(torch, name, value))
        stack.enter_context(patch.object(torch.amp, "autocast", Autocast))
        stack.enter_context(patch.object(torch.amp, "is_autocast_available", is_autocast_available))
        stack.enter_context(patch.object(torch, DEVICE.type, ModuleType(DEVICE.type), create=True))
        _teach_optimizers(stack)
        if found:
            stack.enter_context(patch.object(devices, "resolve_device", resolve_device))
        stack.enter_context(_Autocasting(accelerator))
        stack.enter_context(_Dispatch(accelerator))
        yield accelerator.counts


def _teach_optimizers(stack: ExitStack) -> None:
    """Make optimizers and clipping treat the device as one with fused and foreach kernels."""
    for name in ("_get_fused_kernels_supported_devices", "_get_foreach_kernels_supported_devices"):
        devices = [*getattr(_foreach_utils, name)(), DEVICE.type]
        for module in _OPTIMIZERS:
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, lambda devices=devices: devices))
    types = [*_foreach_utils._foreach_supported_types, _OnDevice, torch.nn.Parameter]
    for module in _OPTIMIZERS:
        if hasattr(module, "_foreach_supported_types"):
            stack.enter_context(patch.object(module, "_foreach_supported_types", types))


def _line_of_the_package() -> str:
    """The innermost line of the package that is being executed, but for this file."""
    frame = inspect.currentframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE) and not file.startswith(_HERE):
            return f"{Path(file).relative_to(_PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the package"
