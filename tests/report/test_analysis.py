"""The data of figures against references: scikit-learn, brute force, what training itself makes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dinoforge.builders.data import build_data
from dinoforge.data.sources import open_source
from dinoforge.models.vit import VisionTransformer
from dinoforge.recipe.load import load_recipe
from dinoforge.report.analysis import (
    displayed,
    false_colour,
    neighbours,
    principal_components,
    seen_crops,
    similarity,
    tokens_and_attention,
)
from dinoforge.runs.metrics import read_metrics


def random_rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(2, 0.5, shape[-1])


@pytest.mark.parametrize("count", [200, 9])  # more rows than dimensions, and fewer
def test_principal_components_are_those_of_scikit_learn(count) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="needs the Python package scikit-learn")
    rows = random_rows(count, 12)
    mean, directions = principal_components(rows, 3)
    reference = decomposition.PCA(3, svd_solver="full").fit(rows.double().numpy())
    cosines = np.abs((directions.numpy() * reference.components_).sum(1))
    np.testing.assert_allclose(cosines, 1, atol=1e-5)
    projected = np.abs(((rows - mean) @ directions.T).numpy())
    np.testing.assert_allclose(projected, np.abs(reference.transform(rows.numpy())), atol=1e-4)


def test_the_cls_tokens_attention_sums_to_one_and_is_what_the_block_uses() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(
        embed_dim=24, depth=2, num_heads=3, patch_size=4, image_size=16, layerscale=1.0, num_register_tokens=2
    ).eval()
    images = torch.randn(2, 3, 16, 24)
    patches, attention = tokens_and_attention(vit, images)
    assert attention.shape == (2, 3, 1 + 2 + 4 * 6)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(patches, vit(images).patches)

    seen: dict[str, Tensor] = {}
    attn = vit.blocks[-1].attn
    attn.register_forward_hook(lambda module, given, out: seen.update(x=given[0], norm=given[1], out=out))
    vit(images)
    values = torch.nn.functional.linear(seen["norm"](seen["x"]), attn.qkv.weight, attn.qkv.bias)
    values = values.view(2, -1, 3, 3, 8)[:, :, 2]  # [B, T, heads, D/heads]
    gathered = torch.einsum("bht,bthd->bhd", attention, values).flatten(1)
    torch.testing.assert_close(gathered, seen["out"].view(2, -1, 24)[:, 0], atol=1e-5, rtol=1e-4)


def test_neighbours_and_similarity_equal_brute_force() -> None:
    features = random_rows(30, 8)
    values, rows = neighbours(features, [3, 17], 4)
    for query, found, similarities in zip([3, 17], rows.tolist(), values.tolist(), strict=True):
        cosine = {i: float(torch.cosine_similarity(features[query], features[i], dim=0)) for i in range(30)}
        del cosine[query]
        assert found == sorted(cosine, key=lambda i: -cosine[i])[:4]
        assert similarities == pytest.approx([cosine[i] for i in found], abs=1e-5)
    expected = torch.cosine_similarity(features, features[19], dim=-1)
    torch.testing.assert_close(similarity(features, 19), expected)


def test_crops_and_masks_are_those_of_the_training_batch() -> None:
    recipe, _ = load_recipe("small", {"train.batch_size_per_gpu": 4, "train.steps": 10, "train.seed": 5})
    rng = np.random.default_rng(0)
    data = build_data(recipe, open_source([rng.integers(0, 256, (80, 90, 3), dtype=np.uint8) for _ in range(9)]))
    step, place = 3, 2
    batch = data[step]
    seen = seen_crops(data, step, place)
    assert seen is not None
    assert seen.index == batch.indices[place]
    crops = [*batch.global_crops[place::4], *batch.local_crops[place::4]]
    assert all(torch.equal(a, b) for a, b in zip(seen.after, crops, strict=True))
    assert torch.equal(seen.masks.flatten(1), batch.masks[place::4])
    assert not all(torch.equal(a, b) for a, b in zip(seen.before, seen.after, strict=True))


def test_torn_and_odd_lines_of_metrics_are_counted_not_fatal(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "total": 2.0}\n[1]\n{"step": 2, "total": NaN, "x": 1}\n{"step": 3, "to')
    columns, unreadable = read_metrics(path)
    assert columns == {"step": [1, 2], "total": [2.0, None], "x": [None, 1]}
    assert unreadable == 2


@pytest.mark.parametrize(
    ("count", "channels", "picture", "said"),
    [
        (1, None, [0], None),
        (2, None, [[0, 1, 0]], "channel 0 as magenta, channel 1 as green"),
        (3, None, [[0, 1, 2]], None),
        (3, (2, 1, 0), [[2, 1, 0]], "of 3 channels, counted from 0, channel 2 as red, 1 as green, 0 as blue"),
        (5, None, [[0, 1, 2]], "of 5 channels, counted from 0, channel 0 as red, 1 as green, 2 as blue"),
        (5, (4, 0, 2), [[4, 0, 2]], "of 5 channels, counted from 0, channel 4 as red, 0 as green, 2 as blue"),
        (5, (3,), [3], "channel 3 of 5 as grey"),
    ],
)
def test_pictures_show_the_channels_that_they_say(count, channels, picture, said) -> None:
    pixels = torch.arange(count, dtype=torch.uint8).view(count, 1, 1)
    assert displayed(pixels, channels)[0].tolist() == picture
    assert false_colour(count, channels) == said
