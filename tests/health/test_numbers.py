"""Numbers that tell collapse from health, against their definitions in plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from dinoforge.health.numbers import Diagnostics, effective_rank, measure_targets, patch_similarity
from dinoforge.kernels import tiles
from dinoforge.kernels.targets import centering, sinkhorn_knopp


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_effective_rank_counts_equal_directions(rank):
    directions = torch.linalg.qr(normal(12, 12))[0]
    features = torch.cat([directions[:rank] * sign for sign in (3.0, -3.0)])  # every direction twice
    assert float(effective_rank(features)) == pytest.approx(rank, rel=1e-5)


def test_effective_rank_between_by_its_definition():
    p = [0.6, 0.3, 0.1]
    features = torch.diag(torch.tensor([6.0, 3.0, 1.0]))
    assert float(effective_rank(features)) == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-5)
    assert float(effective_rank(torch.ones(5, 4))) == pytest.approx(1.0, abs=1e-4)


def test_effective_rank_of_what_is_not_finite_is_no_number():
    assert effective_rank(torch.full((3, 4), torch.nan)) is None
    assert effective_rank(torch.zeros(0, 4)) is None


def test_one_row_has_no_effective_rank_and_one_patch_a_crop_no_similarity():
    assert effective_rank(normal(1, 4)) is None
    assert effective_rank(torch.eye(2)) == pytest.approx(2)
    masks = torch.eye(3, 9, dtype=torch.bool)  # one masked patch a crop: no pair
    assert patch_similarity(normal(3, 5), masks) is None


@pytest.mark.parametrize("images", [1, 2])
def test_how_much_targets_say_about_the_image_takes_two_images(images):
    numbers = Diagnostics()
    masks = torch.zeros(2 * images, 9, dtype=torch.bool)
    masks[:, :3] = True
    numbers.add_features(normal(2 * images, 8), normal(6 * images, 8), masks)
    for loss, samples in (("dino", 2 * images), ("ibot", 6 * images)):
        numbers.add_targets(loss, centering(normal(40, samples), torch.zeros(40), 1.0))
    of_images = {"diag.effective_rank", "diag.target_information.dino"}
    assert of_images & set(numbers.values) == (of_images if images > 1 else set())
    assert {"diag.target_information.ibot", "diag.target_entropy.dino", "diag.patch_similarity"} <= set(numbers.values)


def test_patch_similarity_in_loops():
    masks = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[1], masks[2] = False, False
    masks[2, 4] = True  # a crop without a pair
    patches = normal(int(masks.sum()), 5) + 0.5
    per_crop = patches.split(masks.sum(1).tolist())
    means = []
    for crop in per_crop:
        cosines = [
            float(F.cosine_similarity(crop[i], crop[j], dim=0))
            for i in range(len(crop))
            for j in range(len(crop))
            if i != j
        ]
        means += [sum(cosines) / len(cosines)] if cosines else []
    assert len(means) == 4
    assert float(patch_similarity(patches, masks)) == pytest.approx(sum(means) / 4, abs=1e-5)


@pytest.mark.parametrize("k_times_n", [10**6, 8])
def test_targets_in_loops(k_times_n, monkeypatch):
    monkeypatch.setattr(tiles, "_ON_CPU", (k_times_n, k_times_n))  # one tile, and many
    logits = normal(40, 7, scale=3.0)  # [K, N]
    for targets in (centering(logits.clone(), torch.zeros(40), 1.0), sinkhorn_knopp(logits.clone())):
        rows = targets.rows(slice(None)).tolist()
        entropy = [-sum(p * math.log(p) for p in row if p > 0) for row in rows]
        mean = [sum(row[k] for row in rows) / 7 for k in range(40)]
        information = -sum(p * math.log(p) for p in mean if p > 0) - sum(entropy) / 7
        distinct = len({max(range(40), key=row.__getitem__) for row in rows})
        measured = measure_targets(targets)
        torch.testing.assert_close(measured.entropy, torch.tensor(entropy), rtol=1e-4, atol=1e-5)
        assert float(measured.information) == pytest.approx(information, abs=1e-4)
        assert float(measured.use) == pytest.approx(min(1, distinct / (40 * (1 - (1 - 1 / 40) ** 7))), rel=1e-4)


@pytest.mark.parametrize(("prototypes", "samples"), [(16, 2000), (50_000, 64)])
def test_use_of_prototypes_is_a_share_however_many_samples_there_are(prototypes, samples):
    def use_of(alive):
        """Samples choose evenly among the first ``alive`` prototypes."""
        chosen = torch.randint(alive, (samples,), generator=torch.Generator().manual_seed(3))
        logits = 50 * F.one_hot(chosen, prototypes).T.float()
        return float(measure_targets(centering(logits.contiguous(), torch.zeros(prototypes), 1.0)).use)

    assert use_of(prototypes) == pytest.approx(1, abs=0.02)
    assert use_of(1) == pytest.approx(1 / min(prototypes, samples), rel=0.02)
    assert use_of(prototypes // 2) == pytest.approx(0.5 if samples > prototypes else 1, abs=0.02)


def test_uniform_targets_have_all_of_the_entropy_and_a_single_prototype_has_no_share():
    numbers = Diagnostics()
    numbers.add_targets("dino", centering(torch.zeros(8, 5), torch.zeros(8), 1.0))
    assert float(numbers.values["diag.target_entropy.dino"]) == pytest.approx(1)
    alone = Diagnostics()
    alone.add_targets("dino", centering(torch.zeros(1, 5), torch.zeros(1), 1.0))
    alone.add_cross_entropies({"dino_global": torch.tensor(0.0)})
    assert set(alone.values) == {"diag.prototype_use.dino"}
