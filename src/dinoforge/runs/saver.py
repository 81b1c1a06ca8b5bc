"""Saving a run, while training goes on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from dinoforge.builders.resolved import ResolvedRun
from dinoforge.data.image_input import ImageInput
from dinoforge.errors import RunError
from dinoforge.models.vit import VisionTransformer
from dinoforge.runs import checkpoint
from dinoforge.runs.directory import RunDirectory
from dinoforge.system import distributed
from dinoforge.training.loop import StepReport
from dinoforge.training.state import TrainState
from dinoforge.weights.backbone import Backbone, save_backbone

_RETRY_SECONDS = 60.0


class Saver:
    """Saves checkpoint, backbone and summary of a run after a number of steps or minutes.

    With ``checkpoint.asynchronous`` the state is copied between two steps, and the copy is written by a thread while
    training goes on. What training waits is the copying, and the end of the writing before if that takes
    longer than the time between two checkpoints: ``waited`` seconds in all.

    A checkpoint that cannot be written, as on a full disk, is told and tried again a minute later: those before it
    are still there. Nor is a state written that is not finite, so every checkpoint is worth going back to. Only the
    last one, when training ends, raises.

    On several ranks all decide together when; the first writes what all have.

    Args:
        run: The run directory to write to.
        state: State of the run.
        plan: What the recipe means here.
        image: What the backbone expects of images.
        say: Tells the user.
    """

    def __init__(
        self,
        run: RunDirectory,
        state: TrainState,
        plan: ResolvedRun,
        image: ImageInput,
        say: Callable[[str], object],
    ) -> None:
        self.run, self.state, self.plan, self.image, self.say = run, state, plan, image, say
        self.settings = plan.recipe.checkpoint
        self.waited = 0.0
        self._due = self._next_time()
        self._saved_step: int | None = None  # None also after one that failed
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()
        self._thread.shutdown()

    def __call__(self, report: StepReport) -> None:
        every = self.settings.every_steps
        late = self.settings.every_minutes is not None and distributed.any_over_ranks(time.monotonic() >= self._due)
        if late or (every and self.state.step % every == 0):
            started = time.monotonic()
            self.wait()
            self._start()
            if not self.settings.asynchronous:
                self.wait()
            self.waited += time.monotonic() - started

    def finish(self) -> None:
        """Save the state now, unless that is done for this step.

        Raises:
            RunError: The disk is full, the run directory cannot be written, or the state is not finite.
        """
        started = time.monotonic()
        self.wait()
        if distributed.any_over_ranks(self._saved_step != self.state.step):
            self._start()
            if error := self._ended():
                raise error
        self.waited += time.monotonic() - started
        if distributed.is_first():
            self.run.write_summary({"checkpoint_wait_seconds": round(self.waited, 2)})

    def wait(self) -> None:
        """Wait until nothing is being written; tell what went wrong."""
        if error := self._ended():
            self._due = min(self._due, time.monotonic() + _RETRY_SECONDS)
            self.say(f"not saved  {error}. Training goes on, and tries again within a minute.")

    def _ended(self) -> RunError | None:
        if self._writing is None:
            return None
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except RunError as error:
            self._saved_step = None
            return error
        return None

    def _start(self) -> None:
        """Start to write the state, or a copy of it."""
        step, total, batch_size = self.state.step, self.plan.length.steps, self.plan.length.batch_size
        tensors = checkpoint.whole(self.state.tensors(), copy=self.settings.asynchronous)
        values = self.state.values()
        self._saved_step, self._due = step, self._next_time()
        if not distributed.is_first():
            return
        summary = {
            "finished": step >= total,
            "steps": step,
            "total_steps": total,
            "images": self.plan.length.images,
            "batch_size": batch_size,
            "train_seconds": round(self.state.seconds, 1),
            "images_per_second": round(step * batch_size / max(self.state.seconds, 1e-9), 1),
            "skipped_images": len(self.state.bad_images.skipped),
            "skipped_steps": self.state.skipped_steps,
            "rollbacks": self.state.rollbacks,
            **({"overflows": self.state.overflows} if self.state.scaler else {}),
            "checkpoint_wait_seconds": round(self.waited, 2),
        }
        architecture = self.plan.architecture
        metadata = self.plan.metadata()
        path = self.run.path

        def write() -> None:
            if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
                raise RunError(f"the state after step {step:,} is not finite ({bad[0]}), so it is no checkpoint")
            if step not in checkpoint.steps(path):  # a run that was killed right after writing it
                checkpoint.save(path, step, tensors, values)
            checkpoint.prune(path, keep_last=self.settings.keep_last, keep_every=self.settings.keep_every)
            prefix = "teacher.backbone."
            backbone = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            with torch.device("meta"):
                network = VisionTransformer(**architecture)
            network.load_state_dict(backbone, assign=True)
            save_backbone(self.run.teacher, Backbone(network, architecture, self.image, step, metadata=metadata))
            self.run.write_summary(summary)

        self._writing = self._thread.submit(write)

    def _next_time(self) -> float:
        minutes = self.settings.every_minutes
        return float("inf") if minutes is None else time.monotonic() + minutes * 60
