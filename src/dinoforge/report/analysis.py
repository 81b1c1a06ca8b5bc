"""The data behind each figure of a report: arrays in, arrays out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinoforge.data.bad_images import Skipped
from dinoforge.data.batches import TrainingData
from dinoforge.data.crops import resize
from dinoforge.data.order import sample_rng
from dinoforge.models.layers import Block
from dinoforge.models.vit import VisionTransformer


@dataclass(frozen=True)
class Seen:
    """The crops and masks of one image at one step."""

    index: int
    image: npt.NDArray[np.uint8]  # [H, W, C] that the crops were cut from
    boxes: list[tuple[int, int, int, int]]  # top, left, height, width of each crop in it
    before: list[Tensor]  # crops before their colours change, uint8 [C, h, w]: two global ones, then the local ones
    after: list[Tensor]  # the same crops as the network got them
    masks: Tensor  # [2, rows, columns] bool, of the global crops


def seen_crops(data: TrainingData, step: int, place: int) -> Seen | None:
    """Crops and masks of the image at ``place`` of the global batch of ``step``; None if none could be read."""
    skipped: list[Skipped] = []
    first = step * data.batch_size
    sample = data.sample(first + place, skipped)
    if sample is None:
        return None
    index, image, parameters = sample
    made = []
    for photometry in (False, True):
        global_crops, local_crops = data.crops.empty(1, image.shape[2])
        data.crops.make(image, parameters, global_crops[:, 0], local_crops[:, 0], photometry=photometry)
        made.append([*global_crops[:, 0], *local_crops[:, 0]])
    masks = data.masks(2 * data.batch_size, data.grid, sample_rng(data.seed, first, "masks"))
    of_image = torch.from_numpy(masks).view(2, data.batch_size, *data.grid)[:, place]
    before, after = made
    return Seen(index, image, [p.box for p in parameters], before, after, of_image)


def resized(image: npt.NDArray[np.uint8], height: int, width: int) -> Tensor:
    """An image [H, W, C] in another size, as a tensor [C, height, width]."""
    return torch.from_numpy(resize(image, height, width)).permute(2, 0, 1).contiguous()


def displayed(pixels: Tensor, channels: Sequence[int] | None = None) -> npt.NDArray[np.uint8]:
    """Turn an image into a picture for people, in false colour where it is neither grey nor RGB.

    Args:
        pixels: An image, uint8 [C, h, w].
        channels: Which one is shown as grey, or which three as red, green and blue. None: the only channel; of two, the
            first as magenta and the second as green; the first three.

    Returns:
        The picture, uint8 [h, w] or [h, w, 3].
    """
    array: npt.NDArray[np.uint8] = pixels.permute(1, 2, 0).numpy()
    if channels is not None:
        return array[:, :, channels[0]] if len(channels) == 1 else array[:, :, list(channels)]
    if array.shape[2] == 1:
        return array[:, :, 0]
    return array[:, :, [0, 1, 0]] if array.shape[2] == 2 else array[:, :, :3]


def false_colour(count: int, channels: Sequence[int] | None = None) -> str | None:
    """Say which of an image's channels are shown in which colour; None where they are what they seem.

    Args:
        count: Channels of the image.
        channels: As for ``displayed``.
    """
    shown = channels if channels is not None else range(min(count, 3))
    if list(shown) == list(range(count)) and count in (1, 3):
        return None
    if len(shown) == 1:
        return f"channel {shown[0]} of {count} as grey"
    if len(shown) == 2:
        return "channel 0 as magenta, channel 1 as green"
    red, green, blue = shown
    return f"of {count} channels, counted from 0, channel {red} as red, {green} as green, {blue} as blue"


@torch.no_grad()
def tokens_and_attention(backbone: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patch tokens [B, N, D], and the attention of the cls token in the last block [B, heads, 1 + R + N].

    Args:
        images: Normalised images [B, C, H, W].
    """
    block = backbone.blocks[-1]
    assert isinstance(block, Block)
    inputs: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        patches = backbone(images).patches
    finally:
        handle.remove()
    x = inputs[0].view(len(images), -1, backbone.embed_dim)  # [B, T, D]
    heads = block.attn.num_heads
    q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q[:, :, :1] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [B, heads, 1, T]
    return patches, scores[:, :, 0].softmax(-1)


def principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and leading directions [count, D] of rows [N, D]; each direction's largest entry is positive.

    Fewer than ``count`` come where the rows have fewer dimensions.
    """
    rows = rows.double()
    mean = rows.mean(0)
    rows = rows - mean
    if len(rows) > rows.shape[1]:
        rows = torch.linalg.qr(rows, mode="r").R  # [D, D] of the same directions
    # No randomised solver: a report made while training must not draw from the run's random numbers.
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    directions = directions[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return mean.float(), (directions * largest.sign()).float()


def pca_colours(rows: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Colours of patches of several images in one common basis, as in the paper (section 7.6 and figure 1).

    The first component parts foreground from background: the side with fewer patches is called foreground, for the
    sign of a component means nothing. Where it rather tells whole images apart, so that some image is (nearly) all
    fore- or background, every patch is foreground. The foreground's own three leading components become red, green
    and blue, each stretched to its 1st…99th percentile.

    Args:
        rows: Patch tokens of all images, [N, D].
        sizes: Number of patch tokens of each image.

    Returns:
        Colours [N, 3] in 0..1, and which patches are foreground [N] bool.
    """
    mean, (first,) = principal_components(rows, 1)
    foreground = (rows - mean) @ first > 0
    if foreground.float().mean() > 0.5:
        foreground = ~foreground
    shares = torch.stack([part.float().mean() for part in foreground.split(list(sizes))])
    if shares.min() < 0.05 or shares.max() > 0.95:
        foreground = torch.ones_like(foreground)
    mean, directions = principal_components(rows[foreground], 3)
    colours = (rows - mean) @ directions.T  # [N, ≤3]
    low, high = torch.quantile(colours[foreground], torch.tensor([0.01, 0.99]), dim=0)
    colours = ((colours - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return torch.nn.functional.pad(colours, (0, 3 - colours.shape[1])), foreground


def similarity(rows: Tensor, row: int) -> Tensor:
    """Cosine similarity [N] of every patch token in [N, D] to one of them."""
    unit = torch.nn.functional.normalize(rows, dim=-1)
    return unit @ unit[row]


def neighbours(features: Tensor, queries: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Nearest rows of [N, D] to some of them by cosine, themselves left out: similarities and rows [Q, count]."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    similarities = unit[list(queries)] @ unit.T  # [Q, N]
    similarities[torch.arange(len(queries)), list(queries)] = -torch.inf
    values, rows = similarities.topk(min(count, len(features) - 1), dim=1)
    return values, rows


def project(features: Tensor) -> tuple[Tensor, str]:
    """Places rows of [N, D] in the plane, near where they are alike: positions [N, 2], and how that was done.

    t-SNE (van der Maaten and Hinton 2008) of scikit-learn, on unit vectors and with a random state of its own; two
    principal components where that package is missing or the rows are few.
    """
    unit = torch.nn.functional.normalize(features, dim=-1)
    few = len(unit) < 12
    try:
        from sklearn.manifold import TSNE  # type: ignore[import-untyped]
    except ImportError:
        few, why = True, "two principal components; pip install 'dinoforge[eval]' gives t-SNE"
    else:
        why = f"two principal components, since t-SNE means nothing for {len(unit)} images"
    if few:
        mean, directions = principal_components(unit, 2)
        placed = (unit - mean) @ directions.T
        return torch.nn.functional.pad(placed, (0, 2 - placed.shape[1])), why
    perplexity = min(30.0, (len(unit) - 1) / 3)
    placed = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(unit.numpy())
    return torch.from_numpy(placed), f"t-SNE of scikit-learn, perplexity {perplexity:.0f}"
