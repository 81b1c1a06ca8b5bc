"""What a network has learned, found on a sample of its images."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, Queue
from threading import Thread
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinoforge.data.batch import normalize
from dinoforge.data.crops import whole
from dinoforge.data.decode import decode
from dinoforge.data.image_input import ImageInput
from dinoforge.data.sources import Source, printable
from dinoforge.errors import DataError, ImageError
from dinoforge.features.extract import embed
from dinoforge.report import analysis
from dinoforge.weights.backbone import Backbone

SAMPLE = 300  # images that are looked at
EXAMPLES = 6  # images of the sample that get maps
ENLARGED = 4  # maps are of so many times the resolution of training, in patches along a side,
MOST_PATCHES = 32  # up to that many: attention's memory grows with their fourth power
NEIGHBOURS = 5
T = TypeVar("T")


@dataclass(frozen=True)
class PatchMap:
    """The network's view of one image, patch by patch."""

    name: str
    image: Tensor  # uint8 [C, h, w] as it was shown
    grid: tuple[int, int]  # patches: rows, columns
    tokens: Tensor  # [rows · columns, D]
    attention: Tensor  # [heads, rows · columns]: the cls token's, in the last block


@dataclass(frozen=True)
class Neighbours:
    """An image and those that are nearest to it."""

    query: int  # these are rows of ``Learned``
    rows: list[int]
    similarities: list[float]
    good: bool  # neighbours share its label; without labels, they are close


@dataclass(frozen=True)
class Learned:
    """A network's features of a sample of images; row ``i`` belongs to image ``indices[i]``."""

    step: int  # step of the network
    images: int  # number of images in the data
    asked: int  # images of the sample, of which some may be unreadable
    indices: list[int]
    names: list[str]
    labels: list[str] | None
    shown: Tensor  # uint8 [n, C, S, S]
    cls: Tensor  # [n, D]
    maps: list[PatchMap]
    colours: Tensor  # [patches of all maps, 3] in 0..1
    foreground: Tensor  # [patches of all maps] bool
    positions: Tensor | None  # [n, 2]
    projection: str  # how positions were made
    neighbours: list[Neighbours]
    same_label: float | None  # share of nearest neighbours that have the image's label
    by_chance: float | None  # what that share is for neighbours drawn blindly
    missing: tuple[str, ...]  # sentences

    @property
    def hides(self) -> bool:
        """Whether there is a background, by the first component."""
        return not bool(self.foreground.all())

    @property
    def tokens(self) -> Tensor:
        """Patch tokens of all maps, [N, D]."""
        return torch.cat([m.tokens for m in self.maps])


def study(
    backbone: Backbone,
    source: Source,
    *,
    labels: Sequence[str | None] | None = None,
    device: torch.device | None = None,
    seconds: float | None = None,
) -> Learned:
    """Looks at up to ``SAMPLE`` evenly spaced images; time and memory do not grow with their number.

    Args:
        backbone: The backbone; its network is moved to ``device``.
        source: The images.
        labels: A label for each image; by default those of the source. Where most images have one, the others are left
            out of the sample.
        device: The device that computes; by default the CPU.
        seconds: Seconds after which no further image is read, and one that takes as long is given up; by default the
            whole sample is read, however long that takes.

    Raises:
        DataError: No image can be read, or the storage hangs.
        WeightsError: The backbone's features are not finite.
    """
    device = device or torch.device("cpu")
    network, image = backbone.network.to(device), backbone.image
    chosen = np.unique(np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).round().astype(int)).tolist()
    # In an order of which every beginning is spread over all of them (by the golden ratio), for time may run out.
    order = [chosen[i] for i in sorted(range(len(chosen)), key=lambda i: i * 0.6180339887 % 1)]
    trained = image.size // network.patch_size
    side = min(ENLARGED * trained, max(MOST_PATCHES, min(trained, 2 * MOST_PATCHES)))
    rows: list[tuple[int, str, str | None, Tensor]] = []
    maps: list[PatchMap] = []
    reasons: list[str] = []
    looked = 0
    for index, name, read in _read(source, order, image, seconds):
        looked += 1
        if isinstance(read, ImageError):
            reasons.append(f"{name}: {read}")
            continue
        pixels, label = read
        label = label if labels is None else labels[index]
        rows.append((index, name, None if label is None else printable(label), whole(pixels, image.size)))
        if len(maps) < EXAMPLES:
            maps.append(_map(backbone, name, pixels, side, device))
    missing = []
    if looked < len(order):
        missing.append(f"In {seconds:g} seconds only {looked} of the {len(order)} sampled images were read.")
    if reasons:
        missing.append(f"{len(reasons)} of {looked} sampled images cannot be read, such as {reasons[0]}.")
    if not rows:
        raise DataError(f"none of {looked} sampled images can be read, such as {reasons[0]}")
    labelled = [row for row in rows if row[2] is not None]
    if len(rows) > len(labelled) > len(rows) / 2:
        missing.append(f"Of the sampled images {len(rows) - len(labelled)} without a label are left out.")
        rows = labelled
    found = [label for _, _, label, _ in rows if label is not None]
    known = found if len(found) == len(rows) else None
    shown = torch.stack([pixels for *_, pixels in rows])  # [n, C, S, S]
    features = embed(
        network,
        shown,
        size=image.size,
        channels=image.in_chans,
        mean=image.mean,
        std=image.std,
        **image.decoding,
        device=device,
    )
    tokens = torch.cat([m.tokens for m in maps])
    colours, foreground = analysis.pca_colours(tokens, [len(m.tokens) for m in maps])
    neighbours: list[Neighbours] = []
    same = None
    positions, how = None, ""
    if len(rows) > 3:
        positions, how = analysis.project(features)
        neighbours, same = _neighbours(features, known)
    else:
        missing.append("Neighbours and the map of the data set need at least four readable images.")
    return Learned(
        step=backbone.step,
        images=len(source),
        asked=len(chosen),
        indices=[index for index, *_ in rows],
        names=[name for _, name, *_ in rows],
        labels=known,
        shown=shown,
        cls=features,
        maps=maps,
        colours=colours,
        foreground=foreground,
        positions=positions,
        projection=how,
        neighbours=neighbours,
        same_label=same,
        by_chance=_chance(known) if known and same is not None else None,
        missing=tuple(missing),
    )


def _read(
    source: Source, indices: Sequence[int], image: ImageInput, seconds: float | None
) -> Iterator[tuple[int, str, tuple[npt.NDArray[np.uint8], str | None] | ImageError]]:
    """Index, name, and pixels [H, W, C] with label, or why there are none; ends when the time is over."""

    def read(index: int) -> tuple[npt.NDArray[np.uint8], str | None]:
        item = source.item(index)
        pixels = decode(item.image, channels=image.in_chans, **image.decoding)
        return pixels, item.label

    started = time.monotonic()
    for number, index in enumerate(indices):
        if seconds is not None and number and time.monotonic() - started > seconds:
            return
        name = printable(source.name(index))
        try:
            yield index, name, within(seconds, partial(read, index), f"{name} was")
        except ImageError as error:
            yield index, name, error


def within(seconds: float | None, work: Callable[[], T], what: str) -> T:
    """The result of ``work``.

    Raises:
        DataError: The work takes longer than ``seconds``: a read that storage never answers must not stop a run.
    """
    if seconds is None:
        return work()
    done: Queue[tuple[T, None] | tuple[None, Exception]] = Queue()

    def run() -> None:
        try:
            done.put((work(), None))
        except Exception as error:  # raised again below
            done.put((None, error))

    Thread(target=run, daemon=True, name="report").start()
    try:
        result, error = done.get(timeout=seconds)
    except Empty:
        raise DataError(f"{what} not read within {seconds:g} seconds") from None
    if error is not None:
        raise error
    return cast(T, result)


def bright(row: Tensor) -> Tensor:
    """The value of a head's attention that is shown as brightest: a few patches may get nearly all of the attention."""
    return torch.quantile(row, 0.98).clamp(min=1e-12)


def _map(backbone: Backbone, name: str, pixels: np.ndarray, side: int, device: torch.device) -> PatchMap:
    """The whole image in its own shape, its longer side ``side`` patches long."""
    network, image = backbone.network, backbone.image
    height, width, _ = pixels.shape
    longer = max(height, width)
    rows, columns = (max(1, round(side * edge / longer)) for edge in (height, width))
    resized = analysis.resized(pixels, rows * network.patch_size, columns * network.patch_size)
    images = normalize(resized[None].to(device), image.mean, image.std)
    tokens, attention = analysis.tokens_and_attention(network, images)
    first_patch = 1 + network.num_register_tokens
    return PatchMap(
        name, resized, (rows, columns), tokens[0].float().cpu(), attention[0, :, first_patch:].float().cpu()
    )


def _neighbours(features: Tensor, labels: Sequence[str] | None) -> tuple[list[Neighbours], float | None]:
    """Three good and three bad examples, and the share of all neighbours that have the image's label."""
    count = len(features)
    values, rows = analysis.neighbours(features, range(count), NEIGHBOURS)  # [N, k]
    scores, share = values[:, 0], None
    if labels is not None and len(set(labels)) > 1:
        numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        codes = torch.tensor([numbers[label] for label in labels])
        same = (codes[rows] == codes[:, None]).float().mean(1)  # [N]
        share = float(same.mean())
        scores = same + values[:, 0] / 1000  # among equally good ones the closer comes first
    ranked = scores.argsort(descending=True).tolist()
    shown = min(3, count // 2)
    return [
        Neighbours(query, rows[query].tolist(), values[query].tolist(), good)
        for queries, good in ((ranked[:shown], True), (ranked[-shown:], False))
        for query in queries
    ], share


def _chance(labels: Sequence[str]) -> float:
    """Share of the pairs of different images that have one label."""
    count = len(labels)
    return sum(n * (n - 1) for n in Counter(labels).values()) / (count * (count - 1))
