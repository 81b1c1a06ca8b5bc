"""Starting from given weights."""

import pytest
import torch

from dinoforge import load, train
from dinoforge.builders.networks import build_student_teacher
from dinoforge.builders.start import initialise
from dinoforge.errors import WeightsError
from dinoforge.models.vit import VisionTransformer
from dinoforge.recipe.load import load_recipe

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
KEYS = {f"student.{key}": value for key, value in SIZE.items()} | {
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "dino.head_n_prototypes": 16,
    "dino.head_hidden_dim": 16,
}


def networks(**keys):
    return build_student_teacher(load_recipe("small", KEYS | keys)[0])


def test_student_and_teacher_start_from_the_weights():
    given = VisionTransformer(**SIZE, image_size=32)
    both = networks()
    assert initialise(both, given, None) == []
    for network in (both.student.backbone, both.teacher.backbone):
        assert all(torch.equal(t, given.state_dict()[name]) for name, t in network.state_dict().items())


def test_position_embeddings_are_resampled_and_it_is_told():
    given = VisionTransformer(**SIZE, image_size=56).eval()
    both = networks()
    (note,) = initialise(both, given, None)
    assert "7 × 7 to 4 × 4" in note
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(both.teacher.backbone(images).cls, given(images).cls)


def test_another_rule_of_resampling_is_told():
    given = VisionTransformer(**SIZE, image_size=32, interpolate_antialias=True, interpolate_offset=0.0)
    (note,) = initialise(networks(), given, None)
    assert "student.interpolate_offset" in note


@pytest.mark.parametrize("how", ["repeat", "mean"])
def test_channels_that_are_equal_give_what_they_gave(how):
    given = VisionTransformer(**SIZE, image_size=32, in_chans=3)
    both = networks(**{"student.in_chans": 1, "data.mean": 0.5, "data.std": 0.2})
    initialise(both, given, how)
    if how == "mean":
        image = torch.randn(1, 1, 32, 32)
        with torch.no_grad():
            expected = given(image.repeat(1, 3, 1, 1)).cls
            torch.testing.assert_close(both.student.backbone(image).cls, expected, rtol=1e-4, atol=1e-5)
    wider = networks(**{"student.in_chans": 6, "data.mean": 0.5, "data.std": 0.2})
    initialise(wider, given, how)
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        six, three = (n(image.repeat(1, c, 1, 1)).cls for n, c in ((wider.student.backbone, 6), (given, 3)))
    torch.testing.assert_close(six, three, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_listed_and_changes_nothing():
    given = VisionTransformer(**SIZE | {"num_heads": 4}, image_size=32, in_chans=1, num_register_tokens=2)
    both = networks()
    before = both.student.backbone.cls_token.clone()
    with pytest.raises(
        WeightsError, match=r"unexpected register_tokens.*4 attention heads, expected 2.*init\.in_chans"
    ):
        initialise(both, given, None)
    assert torch.equal(both.student.backbone.cls_token, before)


@pytest.mark.slow
def test_a_run_starts_from_a_file(tmp_path):
    given = VisionTransformer(**SIZE | {"num_heads": 1}, image_size=32)
    torch.save(given.state_dict(), tmp_path / "w.pth")
    images = [torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8) for _ in range(8)]
    keys = {"student.num_heads": 1, "train.steps": 1, "train.batch_size_per_gpu": 4, "train.num_workers": 0}
    keys |= {"optim.min_lr": 0.0, "optim.base_lr": 1e-9, "device": "cpu", "init.weights": str(tmp_path / "w.pth")}
    keys |= {"optim.warmup_length": "0%", "optim.freeze_last_layer_length": "0%"}
    train(images, "small", tmp_path / "run", **KEYS | keys)
    back = load(tmp_path / "run").network.state_dict()
    for name, tensor in given.state_dict().items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1e-6)
