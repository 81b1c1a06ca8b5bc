"""Small networks in which everything matters, and batches for them, for tests of the method and of steps."""

import torch

from dinoforge.builders.networks import build_student_teacher
from dinoforge.data.bad_images import BadImages
from dinoforge.data.batch import Batch, masked_patches
from dinoforge.recipe.load import load_recipe
from dinoforge.training.state import TrainState
from dinoforge.training.step import Stepper

SMALL = {
    "student.arch": "vit_custom",
    "student.embed_dim": 16,
    "student.depth": 2,
    "student.num_heads": 2,
    "student.patch_size": 4,
    "student.layerscale": 1.0,
    "crops.global_crops_size": 16,
    "crops.local_crops_size": 12,
    "crops.local_crops_number": 3,
    "augment.blur_kernel": 3,
    **{f"{k}.head_n_prototypes": 8 for k in ("dino", "ibot")},
    **{f"{k}.head_hidden_dim": 12 for k in ("dino", "ibot")},
    **{f"{k}.head_bottleneck_dim": 6 for k in ("dino", "ibot")},
}
TEMP = 0.05


def make_recipe(overrides=()):
    return load_recipe("dinov2", SMALL | dict(overrides))[0]


def make(overrides=(), recipe=None):
    """Networks in which student and teacher differ and every parameter matters."""
    torch.manual_seed(0)
    networks = build_student_teacher(recipe or make_recipe(overrides))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in networks.named_parameters():
        if not name.endswith("weight_g"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return networks


def make_batch(images=4, local=3, share=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2 * images, 16, generator=generator) < share
    return Batch(
        global_crops=torch.randn(2 * images, 3, 16, 16, generator=generator),
        local_crops=torch.randn(local * images, 3, 12, 12, generator=generator),
        masks=masks,
        masked=masked_patches(masks),
        indices=torch.arange(images),
    )


def make_step(networks, optimizer, batch, hyper, *, kept=None, measure=False, **settings):
    """A step of networks and their optimizer alone; ``settings`` are those of ``Stepper``."""
    state = TrainState(networks, optimizer, None, BadImages(0.0, 1))
    return Stepper(**settings)(state, batch, hyper, kept=kept, measure=measure)
