"""Rules that find what is wrong with a run from its metrics and its recipe alone; see docs/diagnosis.md.

Each rule looks at one line after the other and never ahead, so a run is told while it goes what ``dinoforge doctor``
tells afterwards. Thresholds come from runs that were made to fail, each beside its healthy twin
(benchmarks/failures.py); they are tested against the metrics of those runs.

Nothing here imports torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Line = Mapping[str, float | None]

LINES = 3  # logged lines in a row that a sign must hold
FEW_IMAGES = 8  # with fewer measured at once, what their features have in common passes for a collapse
MAX_UPDATE = 0.015  # a step moves the backbone by that share of its length; healthy: at most 0.0035
MIN_UPDATE = 5e-5  # least update ratio at the peak of the learning rate; healthy: at least 0.0028
UNIFORM_ENTROPY = 0.98  # share of log K; healthy: at most 0.95
UNIFORM_KL = 0.05  # share of log K: beside it, the student has caught up with targets that say nothing
ONE_SIDED_ENTROPY = 0.1  # share of log K; healthy: at least 0.18
ONE_SIDED_USE = 0.05  # share of the prototypes; healthy runs pass through it, but not with targets that are so sharp
MIN_RANK = 1.5  # least effective rank of the cls tokens; healthy: at least 8.6
MAX_CLOSENESS = 2.2  # minus the mean logarithm of the distance to the nearest neighbour; healthy then: at most 1.2
SMALL_CROPS = 0.15  # share of the image, mean of the global crops' range: below it crops are what is looked at first
TINY_CROPS = 0.05  # likewise: below it they are named if the student learns nothing from them
UNLEARNED = 0.9  # divergence over what the targets say about the image; 1 for a student that knows only their mean
MAX_WAITING = 0.4  # share of the time
WAITING_LINES = 10

# No sign of collapse counts in the first steps: networks start uniform, or with cls tokens that are all alike.
SETTLED, SETTLED_LONGER = 0.05, 0.15  # shares of the run
SETTLED_STEPS, SETTLED_LONGER_STEPS = 100, 300  # where the recipe does not say how long it is


@dataclass(frozen=True)
class Finding:
    """A fault of a run."""

    name: str
    step: int  # the step at which it was certain
    sentence: str  # what is seen, and what to try
    keys: tuple[str, ...]  # keys of the recipe to try first


def diagnose(metrics: Mapping[str, Sequence[float | None]], recipe: Mapping[str, Any]) -> list[Finding]:
    """Find what is wrong with a run, in the order in which it showed; an empty list means nothing is.

    Args:
        metrics: Columns of ``metrics.jsonl`` by name, None where a line has no such number.
        recipe: Values of the recipe by dotted key.
    """
    watch = Watch(recipe)
    found: list[Finding] = []
    for i in range(len(metrics.get("step", ()))):
        found += watch({name: column[i] for name, column in metrics.items()})
    return found


class Watch:
    """Finds what is newly wrong in each logged line; each finding comes once.

    Args:
        recipe: Values of the recipe by dotted key.
    """

    def __init__(self, recipe: Mapping[str, Any]) -> None:
        self.recipe = recipe
        self._told: set[str] = set()
        self._in_a_row: dict[str, int] = {}
        self._most_moved = 0.0  # largest share that a step moved the backbone by
        self._before = -1.0  # learning rate of the line before
        self._rules: tuple[Callable[[int, Line], Finding | None], ...] = (
            self._non_finite,
            self._lr_too_high,
            self._lr_too_low,
            self._uniform_collapse,
            self._dead_prototypes,
            self._dimensional_collapse,
            self._crops_alike,
            self._crops_tell_nothing,
            self._data_bound,
        )

    def __call__(self, line: Line) -> list[Finding]:
        step = line.get("step")
        if step is None:
            return []
        self._most_moved = max(self._most_moved, line.get("diag.update_ratio.backbone") or 0.0)
        found = [finding for rule in self._rules if (finding := rule(int(step), line))]
        new = [finding for finding in found if finding.name not in self._told]
        self._told |= {finding.name for finding in new}
        return new

    def _holds(self, rule: str, sign: bool | None, lines: int = LINES) -> bool:
        """Whether a sign has held on so many lines in a row; a line that cannot say (None) does not count."""
        if sign is not None:
            self._in_a_row[rule] = self._in_a_row.get(rule, 0) + 1 if sign else 0
        return self._in_a_row.get(rule, 0) >= lines

    def _is_settled(self, step: int, share: float, steps: int) -> bool:
        total = self.recipe.get("train.steps")
        if total is None and self.recipe.get("train.epochs") is None:
            total = self.recipe["optim.epochs"] * self.recipe["train.OFFICIAL_EPOCH_LENGTH"]
        return step >= (steps if total is None else share * total)

    def _is_telling(self) -> bool:
        """Whether enough images are measured at once to say what differs between them.

        They are those of a micro-batch, so accumulation makes them no more. Of one image the effective rank is 1, of
        two with a cosine of 0.95 it is below 1.5, and both crops of one image may well have one prototype.
        """
        return int(self.recipe["train.batch_size_per_gpu"]) >= FEW_IMAGES

    def _loss(self, line: Line) -> str:
        """Which loss's targets to look at: those of the cls tokens, where there are some."""
        return "dino" if line.get("diag.target_entropy.dino") is not None else "ibot"

    def _prototypes(self, loss: str) -> str:
        """The key of their number."""
        own_head = loss == "ibot" and self.recipe.get("ibot.separate_head")
        return f"{'ibot' if own_head else 'dino'}.head_n_prototypes"

    def _is_balanced(self, loss: str) -> bool:
        """Whether the targets of a loss are Sinkhorn-Knopp's, so that nobody is advised to take them."""
        targets = self.recipe.get(f"{loss}.targets") or self.recipe.get("train.centering")
        return bool(targets == "sinkhorn_knopp")

    def _balancing(self, loss: str) -> str:
        """The key that switches Sinkhorn-Knopp on: the one that decides now."""
        return "train.centering" if self.recipe.get(f"{loss}.targets") is None else f"{loss}.targets"

    def _non_finite(self, step: int, line: Line) -> Finding | None:
        skipped = line.get("skipped_steps") or 0
        if not skipped:
            return None
        exact = self.recipe.get("precision") == "fp32"
        return Finding(
            "non_finite",
            step,
            f"{skipped:.0f} {'step was' if skipped == 1 else 'steps were'} skipped, because a loss or gradient was not "
            "finite. One in thousands does no harm; of more, dinoforge replay shows the cause. Try "
            f"{'' if exact else 'precision=fp32, '}a lower optim.base_lr, or a longer optim.warmup_length.",
            (*(() if exact else ("precision",)), "optim.base_lr", "optim.warmup_length"),
        )

    def _lr_too_high(self, step: int, line: Line) -> Finding | None:
        ratio = line.get("diag.update_ratio.backbone")
        if not self._holds("lr_too_high", None if ratio is None else ratio > MAX_UPDATE) or ratio is None:
            return None
        return Finding(
            "lr_too_high",
            step,
            f"The learning rate is too high: one step moves the backbone by {ratio:.1%} of its length, where about "
            f"0.3% is healthy. Lower optim.base_lr (now {self.recipe['optim.base_lr']:g}), to about a tenth.",
            ("optim.base_lr", "optim.warmup_length"),
        )

    def _lr_too_low(self, step: int, line: Line) -> Finding | None:
        lr, most = line.get("lr"), self._most_moved
        if lr is None or not most or self.recipe.get("init.weights"):  # given weights are often tuned gently
            return None
        rises = lr > self._before  # in the warm-up, small steps are meant
        self._before = lr
        if not self._holds("lr_too_low", not rises and most < MIN_UPDATE):
            return None
        return Finding(
            "lr_too_low",
            step,
            f"The learning rate is too low: even at its peak a step moved the backbone by only {most:.1e} of its "
            f"length, where about 3e-03 is healthy. Raise optim.base_lr (now {self.recipe['optim.base_lr']:g}).",
            (
                "optim.base_lr",
                *(("optim.layerwise_decay",) if self.recipe.get("optim.layerwise_decay") != 1 else ()),
                *(("optim.scaling_rule",) if self.recipe.get("optim.scaling_rule") != "none" else ()),
            ),
        )

    def _uniform_collapse(self, step: int, line: Line) -> Finding | None:
        loss = self._loss(line)
        entropy = line.get(f"diag.target_entropy.{loss}")
        kl = line.get("diag.kl.ibot" if loss == "ibot" else "diag.kl.dino_global")
        kl = line.get("diag.kl.dino_local") if kl is None else kl
        sign = None if entropy is None or kl is None else entropy > UNIFORM_ENTROPY and kl < UNIFORM_KL
        balanced = self._is_balanced(loss)
        if balanced and self.recipe["train.batch_size_per_gpu"] * (self.recipe.get("train.accumulate") or 1) == 1:
            # Among the crops of one image, balanced targets are uniform if the crops look alike. With several ranks
            # they may be of more images, but that the recipe does not say.
            sign = None
        holds = self._holds("uniform_collapse", sign and self._is_settled(step, SETTLED, SETTLED_STEPS))
        if not holds or entropy is None:
            return None
        temp = line.get("teacher_temp") or self.recipe["teacher.teacher_temp"]
        cool = temp <= 0.045
        cooler = f"Lower teacher.teacher_temp (now {temp:g}) towards 0.04. If that does not help, take"
        prototypes = self._prototypes(loss)
        fewer = f"fewer prototypes ({prototypes}, now {int(self.recipe[prototypes]):,})"
        balance = f"Sinkhorn-Knopp ({self._balancing(loss)}=sinkhorn_knopp)"
        ways = f"{fewer} or a larger batch" if balanced else f"{fewer}, a larger batch, or {balance}"
        return Finding(
            "uniform_collapse",
            step,
            f"Uniform collapse: the teacher's targets have {entropy:.1%} of the largest entropy, so they say next to "
            f"nothing about the image, and the loss teaches as little. {'Take' if cool else cooler} {ways}.",
            (
                *(() if cool else ("teacher.teacher_temp",)),
                prototypes,
                "train.batch_size_per_gpu" if balanced else self._balancing(loss),
            ),
        )

    def _dead_prototypes(self, step: int, line: Line) -> Finding | None:
        loss = self._loss(line)
        entropy, use = line.get(f"diag.target_entropy.{loss}"), line.get(f"diag.prototype_use.{loss}")
        # A batch of few samples has few prototypes in use at best: then two are few.
        k, samples = int(self.recipe[self._prototypes(loss)]), 2 * self.recipe["train.batch_size_per_gpu"]
        of_samples = k * -math.expm1(samples * math.log1p(-1 / k)) if k > 1 else 1.0
        few = ONE_SIDED_USE if loss == "ibot" else max(ONE_SIDED_USE, 2.1 / of_samples)
        sign = None if entropy is None or use is None else entropy < ONE_SIDED_ENTROPY and use < few and k > 1
        if not self._is_telling() or not self._holds("dead_prototypes", sign) or use is None:
            return None
        temp = f"teacher.teacher_temp (now {line.get('teacher_temp') or self.recipe['teacher.teacher_temp']:g})"
        centre = self.recipe[f"{loss}.center_momentum"]
        if self._is_balanced(loss):
            advice = f"The targets are balanced already (Sinkhorn-Knopp), so raise {temp}, or take a larger batch."
            keys: tuple[str, ...] = ("teacher.teacher_temp", "train.batch_size_per_gpu")
        else:
            usual = ", 0.9 is usual" if centre > 0.9 else ""
            balancing = self._balancing(loss)
            advice = (
                f"Bring the centre closer to the logits (a lower {loss}.center_momentum, now {centre:g}{usual}), "
                f"balance them (Sinkhorn-Knopp, {balancing}=sinkhorn_knopp), or raise {temp}."
            )
            keys = (f"{loss}.center_momentum", balancing, "teacher.teacher_temp")
        return Finding(
            "dead_prototypes",
            step,
            f"Dead prototypes: the teacher is certain ({entropy:.1%} of the largest entropy) and names nearly always "
            f"the same few ({use:.1%} of those that could be in use), whatever the image. {advice}",
            keys,
        )

    def _dimensional_collapse(self, step: int, line: Line) -> Finding | None:
        rank = line.get("diag.effective_rank")
        sign = None if rank is None or not self._is_telling() else rank < MIN_RANK
        holds = self._holds("dimensional_collapse", sign)
        if not holds or not self._is_settled(step, SETTLED_LONGER, SETTLED_LONGER_STEPS) or rank is None:
            return None
        scale = self.recipe["student.layerscale"]
        small = 0 < scale < 0.1
        first, keys = self._spreading(line)
        if small:
            first = (
                f"Blocks add next to nothing at student.layerscale={scale:g}, and a short run does not outgrow it: set "
                "it to 1."
            )
            keys = ("student.layerscale",)
        return Finding(
            "dimensional_collapse",
            step,
            f"Dimensional collapse: the cls tokens of different images spread in {rank:.1f} directions, so they hardly "
            f"depend on the image. {first}",
            keys,
        )

    def _spreading(self, line: Line) -> tuple[str, tuple[str, ...]]:
        """Ways to spread cls tokens that are not on yet, in words, and their keys."""
        weight = self.recipe["dino.koleo_loss_weight"]
        lr = self.recipe["optim.base_lr"]
        more = f"Give dino.koleo_loss_weight more weight (now {weight:g})"
        koleo = more if weight > 0 else "Switch KoLeo on (dino.koleo_loss_weight, now 0; 0.1 is usual)"
        loss = self._loss(line)
        if self._is_balanced(loss):
            return f"{koleo} or lower optim.base_lr (now {lr:g}).", ("dino.koleo_loss_weight", "optim.base_lr")
        key = self._balancing(loss)
        return (
            f"{koleo}, lower optim.base_lr (now {lr:g}), or take Sinkhorn-Knopp targets ({key}=sinkhorn_knopp).",
            ("dino.koleo_loss_weight", "optim.base_lr", key),
        )

    def _crops_alike(self, step: int, line: Line) -> Finding | None:
        """Different images give nearly the same features: because of tiny crops, or of a collapse."""
        weight, koleo = self.recipe["dino.koleo_loss_weight"], line.get("koleo")
        closeness = koleo / (2 * weight) if koleo is not None and weight > 0 else None  # it is summed over two views
        sign = None if closeness is None else closeness > MAX_CLOSENESS
        if not self._holds("crops_alike", sign) or not self._is_settled(step, 2 * SETTLED, 2 * SETTLED_STEPS):
            return None
        assert closeness is not None
        seen = (
            f"the nearest neighbour of a crop's feature is at a distance of {math.exp(-closeness):.2f} on average (2 "
            "is the largest), so crops of different images look the same to the network."
        )
        if self._seen_share() < SMALL_CROPS:
            return self._too_strong(step, seen)
        return Finding(
            "dimensional_collapse",
            step,
            f"Dimensional collapse: {seen} If the images do differ, give dino.koleo_loss_weight (now {weight:g}) more "
            "weight, lower optim.base_lr, or weaken the augmentation.",
            ("dino.koleo_loss_weight", "optim.base_lr", "crops.global_crops_scale"),
        )

    def _crops_tell_nothing(self, step: int, line: Line) -> Finding | None:
        """A student that cannot tell from one tiny crop what the teacher sees in another."""
        kl, information = line.get("diag.kl.dino_global"), line.get("diag.target_information.dino")
        unlearned = kl / information if kl is not None and information else None
        if not self._is_telling():  # of few images, the mean of the targets says much about each
            unlearned = None
        sign = None if unlearned is None else unlearned > UNLEARNED and self._seen_share() < TINY_CROPS
        holds = self._holds("crops_tell_nothing", sign)
        if not holds or not self._is_settled(step, SETTLED_LONGER, SETTLED_LONGER_STEPS) or unlearned is None:
            return None
        return self._too_strong(
            step,
            "from one global crop the student cannot tell what the teacher sees in another of the same image (its "
            f"divergence is {unlearned:.1f} times that of knowing the targets' mean alone).",
        )

    def _seen_share(self) -> float:
        """Which share of an image a global crop shows, in the middle."""
        return float(sum(self.recipe["crops.global_crops_scale"]) / 2)

    def _too_strong(self, step: int, seen: str) -> Finding:
        low, high = self.recipe["crops.global_crops_scale"]
        return Finding(
            "augmentation_too_strong",
            step,
            f"Augmentation is too strong: {seen} Global crops show only {low:.1%} to {high:.1%} of an image: raise "
            "crops.global_crops_scale, to [0.32, 1] if nothing speaks against it.",
            ("crops.global_crops_scale", "crops.local_crops_scale"),
        )

    def _data_bound(self, step: int, line: Line) -> Finding | None:
        share = line.get("data_wait_share")
        if not self._holds("data_bound", None if share is None else share > MAX_WAITING, WAITING_LINES):
            return None
        reduced = self.recipe.get("data.reduced_decode")
        return Finding(
            "data_bound",
            step,
            f"Data-bound: steps wait {share:.0%} of their time for crops. Raise train.num_workers if processors are "
            f"idle, {'' if reduced else 'set data.reduced_decode=true for large JPEG files, '}or make smaller copies "
            "of the images; dinoforge bench measures what helps.",
            (
                "train.num_workers",
                *(() if reduced else ("data.reduced_decode",)),
                *(() if self.recipe.get("augment.device") == "train" else ("augment.device",)),
            ),
        )
