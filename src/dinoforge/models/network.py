"""A backbone with its heads: the network of the student, and of the teacher."""

import torch
from torch import Tensor, nn

from dinoforge.models.head import DINOHead
from dinoforge.models.vit import VisionTransformer


class Network(nn.Module):
    """A backbone and its heads.

    Args:
        backbone: Encodes crops.
        dino_head: Reads cls tokens, and masked patches as well where there is no ``ibot_head``.
        ibot_head: Reads masked patches.
    """

    def __init__(
        self, backbone: VisionTransformer, dino_head: DINOHead | None = None, ibot_head: DINOHead | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.dino_head, self.ibot_head = backbone, dino_head, ibot_head

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The sub-networks by name; the gradient of each is clipped separately."""
        return {"backbone": self.backbone, **self.heads}

    @property
    def heads(self) -> dict[str, DINOHead]:
        """The existing heads, by name."""
        both = {"dino_head": self.dino_head, "ibot_head": self.ibot_head}
        return {name: head for name, head in both.items() if head is not None}

    @property
    def cls_head(self) -> DINOHead:
        """The head that reads cls tokens."""
        assert self.dino_head is not None
        return self.dino_head

    @property
    def patch_head(self) -> DINOHead:
        """The head that reads masked patches."""
        return self.cls_head if self.ibot_head is None else self.ibot_head

    @property
    def patch_head_name(self) -> str:
        """The name of the head that reads masked patches."""
        return "dino_head" if self.ibot_head is None else "ibot_head"

    def losses_of(self, head: str) -> tuple[str, ...]:
        """List the losses that read a head."""
        of_cls, of_patches = ("dino_global", "dino_local"), ("ibot",)
        if self.ibot_head is None:
            return of_cls + of_patches
        return of_patches if head == "ibot_head" else of_cls

    def drop_last_layer_gradients(self) -> None:
        """Drop the gradients of the heads' last layers, so that the optimizer skips these layers."""
        for head in self.heads.values():
            for parameter in head.last_layer.parameters():
                parameter.grad = None

    def embed(self, global_cls: Tensor, local_cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the bottlenecks [N, d] of tokens [N, D], in one pass per head, so each weight gets one gradient."""
        if self.ibot_head is not None:
            cls, local = _together(self.dino_head, global_cls, local_cls)
            (guesses,) = _together(self.ibot_head, patches)
            return cls, local, guesses
        cls, local, guesses = _together(self.dino_head, global_cls, local_cls, patches)
        return cls, local, guesses


def _together(head: DINOHead | None, *tokens: Tensor) -> tuple[Tensor, ...]:
    if head is None:  # no loss reads it
        return tokens
    embedded: tuple[Tensor, ...] = head.embed(torch.cat(tokens)).split([len(t) for t in tokens])
    return embedded
