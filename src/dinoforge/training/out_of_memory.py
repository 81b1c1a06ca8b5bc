"""What running out of memory is told as, and what is saved after it."""

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dinoforge import distributed
from dinoforge.data.batch import Batch
from dinoforge.errors import DinoforgeError, OutOfMemoryError
from dinoforge.training.device import free_memory
from dinoforge.training.loop import TrainState
from dinoforge.training.saver import Saver

_SIGNS = (
    "out of memory",  # of CUDA where it is no OutOfMemoryError, of MPS, of NCCL
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch, NumPy or Python says that there is no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def out_of_memory_in_words(device: torch.device, ways: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Has what runs out of memory meanwhile end with what there was, what was asked for, and what helps.

    Args:
        device: that is computed on.
        ways: gives what would take less memory, in the order to try it.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        helps = ways()
        advice = f"In this order, try: {'; '.join(helps)}" if helps else "Only a smaller network or smaller crops help"
        raise OutOfMemoryError(f"{device} is out of memory. {_what_happened(error, device)}. {advice}") from error


def _what_happened(error: BaseException, device: torch.device) -> str:
    """What was asked for and what there was, as the library says it, without its own advice."""
    text = str(error).strip().partition("\n")[0]
    if asked := re.search(r"you tried to allocate (\d+) bytes", text):  # of main memory
        free = free_memory(torch.device("cpu"))
        left = "" if free is None else f", and {free / 2**30:.1f} GiB are free"
        return f"{int(asked[1]) / 2**30:.1f} GiB of main memory were asked for{left}"
    sentences = re.split(r"(?<=\.)\s+(?=[A-Z])", text)
    told = [s.rstrip(".") for s in sentences if re.search("Tried to allocate|capacity|max allowed|ALLOC_FAILED", s)]
    return ". ".join(told) or text.rstrip(".") or type(error).__name__


class LastStep:
    """What the last step left, in case the next one runs out of memory: one process saves it.

    Args:
        state: of the run.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._step = state.step
        self._centers: list[Tensor] = []
        self._version = self._version_now()

    def remembered(self, prepare: Callable[[Batch], Batch]) -> Callable[[Batch], Batch]:
        """``prepare``, with which a step begins, having noted what there is before."""

        def remember(batch: Batch) -> Batch:
            self._step, self._version = self._state.step, self._version_now()
            self._centers = [center.clone() for center in self._state.student_teacher.buffers()]
            return prepare(batch)

        return prepare if distributed.is_active() else remember

    def save_after(self, error: BaseException, saver: Saver, say: Callable[[str], object]) -> None:
        """Saves the state of the last whole step, if the error is of memory, and if the state is still that."""
        state = self._state
        if not is_out_of_memory(error) or distributed.is_active():  # perhaps of one rank, and all save together
            return
        if state.step == self._step:  # it came before the step was done
            if self._version_now() != self._version:
                say("\nnot saved  memory ran out while weights were updated. The last checkpoint is still there.")
                return
            for center, before in zip(state.student_teacher.buffers(), self._centers, strict=True):
                center.copy_(before)  # a forward pass moves it
        traceback.clear_frames(error.__traceback__)  # they hold what the step has made
        state.optimizer.zero_grad(set_to_none=True)
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        try:
            saver.finish()
        except (DinoforgeError, RuntimeError, MemoryError) as why:
            say(f"\nnot saved  {why}. The last checkpoint is still there.")
        else:
            say(f"\nsaved      step {state.step:,}, the last one before memory ran out.")

    def _version_now(self) -> int:
        """A number that rises with the first thing that the optimizer changes: its count of steps."""
        return sum(values["step"]._version for values in self._state.optimizer.state.values())
