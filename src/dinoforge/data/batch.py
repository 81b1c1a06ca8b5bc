"""One step's data: crops, masks, and where they come from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from dinoforge.data.photometry import Photometry, PhotometryBatch, recolour_batch
from dinoforge.system.transfer import to_device


@dataclass(frozen=True)
class Share:
    """What a piece is of the batch that it was cut from.

    A loss is a sum over crops with weights that depend on the whole batch alone, so that the losses of pieces add up.

    Args:
        images: B, the number of images of the whole batch.
        local_crops: L, the number of local crops of each image in the whole batch.
        views: Which of the two global crops the piece has, in order.
        first_image: The place of the piece's first image among the B.
        first_patch: The place of the piece's first masked patch among all masked patches of its images.
    """

    images: int
    local_crops: int
    views: tuple[int, ...] = (0, 1)
    first_image: int = 0
    first_patch: int = 0


@dataclass(frozen=True)
class Batch:
    """Crops and masks of B images.

    Crops are ordered crop-major, as in the reference: the first crop of all images, then the second of all images…

    Args:
        global_crops: uint8 [2·B, C, H, W].
        local_crops: uint8 [L·B, C, h, w]; L may be 0.
        masks: bool [2·B, N], True where the student sees the mask token.
        masked: int64 [M], where `masks.flatten()` is true. Stays on the CPU, so that no step waits for the device to
            learn how many there are and where.
        indices: int64 [B], positions in the source of the images that were used.
        skipped: Index, printable name and reason of each image that could not be read while this batch was made.
        photometry: What remains to be done to the colours of the global and of the local crops; None if it is done.
            Stays on the CPU.
        piece_of: What the batch is of a larger one; None if it is whole. Then it may have only some of the crops.
    """

    global_crops: torch.Tensor
    local_crops: torch.Tensor
    masks: torch.Tensor
    masked: torch.Tensor
    indices: torch.Tensor
    skipped: tuple[tuple[int, str, str], ...] = ()
    photometry: tuple[PhotometryBatch, PhotometryBatch] | None = None
    piece_of: Share | None = None

    @property
    def share(self) -> Share:
        """What the batch is of the one that it was cut from, or of itself."""
        return self.piece_of or Share(len(self.indices), len(self.local_crops) // len(self.indices))

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to a device; from pinned memory without waiting for it."""
        return replace(
            self,
            global_crops=self.global_crops.to(device, non_blocking=True),
            local_crops=self.local_crops.to(device, non_blocking=True),
            masks=self.masks.to(device, non_blocking=True),
            indices=self.indices.to(device, non_blocking=True),
        )

    def split(self, parts: int) -> list["Batch"]:
        """Cut the batch into parts of equally many images, in their order; it is prepared, and its parts are, too.

        Args:
            parts: Divides B. What could not be read stays with the first part.
        """
        if parts == 1:
            return [self]
        assert self.photometry is None

        def cut(crops: torch.Tensor) -> list[torch.Tensor]:
            if not len(crops):  # no local crops
                return [crops] * parts
            by_image = crops.unflatten(0, (-1, len(self.indices)))  # [crops, B, …]
            return [part.flatten(0, 1) for part in by_image.chunk(parts, dim=1)]

        whole = self.share
        # Counted on the CPU, where `masked` is: which part each masked patch belongs to, and where it is there.
        patches = self.masks.shape[1]
        crop, patch = self.masked // patches, self.masked % patches
        image, view = crop % len(self.indices), crop // len(self.indices)
        share = len(self.indices) // parts
        columns = zip(
            *(cut(crops) for crops in (self.global_crops, self.local_crops, self.masks)),
            self.indices.chunk(parts),
            strict=True,
        )
        return [
            Batch(
                global_crops=global_crops,
                local_crops=local_crops,
                masks=masks,
                masked=((view * share + image % share) * patches + patch)[image // share == number],
                indices=indices,
                skipped=self.skipped if number == 0 else (),
                piece_of=replace(whole, first_image=whole.first_image + number * share),
            )
            for number, (global_crops, local_crops, masks, indices) in enumerate(columns)
        ]

    def with_crops(self, views: Sequence[int], local: slice) -> "Batch":
        """Take some of the crops of all images.

        Args:
            views: Which of the two global crops, in order; consecutive, perhaps none.
            local: Which of the L local crops.
        """
        images, patches = len(self.indices), self.masks.shape[1]
        of_globals = slice(views[0] * images, (views[-1] + 1) * images) if views else slice(0, 0)
        # Looked up on the CPU, where `masked` is.
        bounds = torch.tensor([of_globals.start, of_globals.stop]) * patches
        first, last = torch.searchsorted(self.masked, bounds).tolist()
        return replace(
            self,
            global_crops=self.global_crops[of_globals],
            local_crops=self.local_crops[local.start * images : local.stop * images],
            masks=self.masks[of_globals],
            masked=self.masked[first:last] - bounds[0],
            piece_of=replace(self.share, views=tuple(views), first_patch=first),
        )

    def pin_memory(self) -> "Batch":
        """Copy the tensors to page-locked memory."""
        return replace(
            self,
            global_crops=self.global_crops.pin_memory(),
            local_crops=self.local_crops.pin_memory(),
            masks=self.masks.pin_memory(),
            indices=self.indices.pin_memory(),
        )


def masked_patches(masks: torch.Tensor) -> torch.Tensor:
    """Where masks [2·B, N] are true: indices [M] into `masks.flatten()`."""
    return masks.flatten().nonzero()[:, 0]


def collate_photometry(
    drawn: Sequence[Sequence[Photometry]], *, global_number: int
) -> tuple[PhotometryBatch, PhotometryBatch]:
    """Lay out what was drawn for the crops of B images, crop-major.

    Args:
        drawn: Per image, what was drawn for its global crops, then for its local ones.
        global_number: Number of global crops, G.
    """
    by_crop = list(zip(*drawn, strict=True))
    global_part, local_part = by_crop[:global_number], by_crop[global_number:]
    return PhotometryBatch.of(list(chain(*global_part))), PhotometryBatch.of(list(chain(*local_part)))


def normalize(crops: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Bring crops to the network's range: (crops / 255 - mean) / std, on the device where they are.

    Args:
        crops: uint8 [N, C, H, W]. Floating-point crops are taken to be normalised already and returned as they are.
        mean: Per channel, of values in 0…1; length C or 1.
        std: Likewise.

    Returns:
        float32 [N, C, H, W].
    """
    if crops.is_floating_point():
        return crops
    shape = (1, -1, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32).mul(255).reciprocal().view(shape)
    shift = torch.tensor(mean, dtype=torch.float32).mul(255).view(shape)
    return (crops.float() - to_device(shift, crops.device)) * to_device(scale, crops.device)


def prepare(batch: Batch, *, device: torch.device, mean: Sequence[float], std: Sequence[float]) -> Batch:
    """Bring a batch to a device, its colours changed as drawn where that remains to be done, and normalised."""
    batch = batch.to(device)
    drawn = batch.photometry or (None, None)

    def finish(crops: torch.Tensor, photometry: PhotometryBatch | None) -> torch.Tensor:
        return normalize(recolour_batch(crops, photometry) if photometry else crops, mean, std)

    return replace(
        batch,
        global_crops=finish(batch.global_crops, drawn[0]),
        local_crops=finish(batch.local_crops, drawn[1]),
        photometry=None,
    )
