"""The numbers of the reference implementation; how they were measured is in data/README.md."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinoforge.builders.lengths import RunLength, build_schedules
from dinoforge.method.koleo import koleo_loss
from dinoforge.models.head import DINOHead
from dinoforge.models.vit import VisionTransformer
from dinoforge.optim.param_groups import parameter_groups
from dinoforge.recipe.load import load_recipe
from dinoforge.selfcheck.fidelity import world_size_of
from fidelity import check
from plain_losses import centering, dino_loss, ibot_loss, sinkhorn_knopp, updated_center

DATA = Path(__file__).parent / "data"
CASES = sorted(path.parent.name for path in check.CASES.glob("*/case.json"))
RUNS = [
    pytest.param(name, marks=pytest.mark.processes) if world_size_of(check.CASES / name) > 1 else name for name in CASES
]


def test_all_cases_are_here():
    assert len(CASES) == 6


@pytest.mark.parametrize("name", RUNS)
def test_steps_agree_with_the_reference(name, capsys):
    assert check.main([str(check.CASES / name)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("least", [None, 1])
@pytest.mark.parametrize("name", [name for name in CASES if world_size_of(check.CASES / name) == 1])
def test_plain_steps_agree_with_the_reference(name, least):
    """Those of two ranks are in tests/accelerator/test_fidelity.py."""
    errors = check.run_case(check.CASES / name, least_tokens=least, kernels="plain")
    assert errors.within_bounds, errors.worst


@pytest.mark.parametrize(
    ("section", "key", "value", "kind"),
    [
        ("optim", "layerwise_decay", 0.8, "parameter"),
        ("optim", "clip_grad", 1.0, "parameter"),
        ("dino", "koleo_loss_weight", 0.2, "loss"),
        ("train", "centering", "sinkhorn_knopp", "loss"),
        ("student", "interpolate_offset", 0.0, "loss"),
        ("optim", "weight_decay_scope", "backbone", "parameter"),
    ],
)
def test_a_departure_from_the_reference_is_found(tmp_path, section, key, value, kind):
    case = tmp_path / "case"
    shutil.copytree(check.CASES / "centering_shared_head", case)
    settings = json.loads((case / "case.json").read_text())
    settings["config"].setdefault(section, {})[key] = value
    (case / "case.json").write_text(json.dumps(settings))
    assert check.run_case(case).worst[kind][0] > 1


def test_a_number_that_is_not_one_is_found(tmp_path):
    case = tmp_path / "case"
    shutil.copytree(check.CASES / "no_layer_decay_no_koleo", case)
    batch = load_file(case / "batch_0.safetensors")
    batch["global_crops"][0, 0, 0, 0] = 1e30
    save_file(batch, case / "batch_0.safetensors")
    with pytest.raises(Exception, match="not finite"):
        check.run_case(case)
    assert check.main([str(tmp_path)]) == 2  # no case there


@pytest.fixture(scope="module")
def losses():
    return load_file(DATA / "losses.safetensors")


def assert_close(ours, theirs, bound=1e-5):
    assert float((ours - theirs).detach().norm()) <= bound * float(theirs.norm())


@pytest.mark.parametrize("peaky", ["", "_peaky"])
def test_sinkhorn_knopp(losses, peaky):
    assert_close(
        sinkhorn_knopp(losses[f"teacher_cls_logits{peaky}"], 0.05).rows(slice(None)), losses[f"sinkhorn_0.05{peaky}"]
    )


def test_sinkhorn_knopp_of_patches(losses):
    assert_close(sinkhorn_knopp(losses["ibot_teacher_logits"], 0.06).rows(slice(None)), losses["ibot_sinkhorn_006"])


def test_centering_uses_the_average_of_earlier_steps(losses):
    center = torch.zeros(losses["teacher_cls_logits"].shape[1])
    assert_close(centering(losses["teacher_cls_logits"], 0.05, center).rows(slice(None)), losses["centered_step0_0.05"])
    center = updated_center(center, losses["teacher_cls_logits"], 0.9)
    assert_close(center, losses["center_after_1"][0])
    second = centering(losses["teacher_cls_logits_step1"], 0.05, center)
    assert_close(second.rows(slice(None)), losses["centered_step1_0.05"])


def test_dino_terms_and_gradients(losses):
    # The file holds each student row against the teacher row of the same index; here views are crossed.
    student_global = losses["student_global_logits"].roll(6, 0).requires_grad_()
    student_local = losses["student_local_logits"].clone().requires_grad_()
    targets = sinkhorn_knopp(losses["teacher_cls_logits"], 0.05)
    prototypes = torch.eye(student_global.shape[1])
    glob, loc = dino_loss(student_global, student_local, prototypes, targets, local_crops_number=4, student_temp=0.1)
    glob, loc = glob * 10 / 2, loc * 10  # as the file has them: before they are divided by the number of pairs
    (glob + loc).backward()
    assert_close(glob, losses["dino_global_unscaled"])
    assert_close(loc, losses["dino_local_unscaled"])
    assert_close(student_global.grad.roll(6, 0), losses["grad_student_global_logits"])
    assert_close(student_local.grad, losses["grad_student_local_logits"])


def test_ibot_and_gradient(losses):
    student = losses["ibot_student_logits"].clone().requires_grad_()
    targets = sinkhorn_knopp(losses["ibot_teacher_logits"], 0.06)
    loss = ibot_loss(student, torch.eye(student.shape[1]), targets, losses["masks"].bool(), 0.1)
    loss.backward()
    assert_close(loss, losses["ibot_loss"])
    assert_close(student.grad, losses["grad_ibot_student_logits"])


def test_koleo_and_gradient(losses):
    x = losses["koleo_input"].clone().requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert_close(loss, losses["koleo_loss"])
    assert_close(x.grad, losses["grad_koleo_input"])


MODELS = {
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 14, "image_size": 224},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "patch_size": 16, "image_size": 224},
    "vit_giant2": {
        "embed_dim": 1536,
        "depth": 40,
        "num_heads": 24,
        "patch_size": 14,
        "image_size": 224,
        "ffn_layer": "swiglufused",
        "num_register_tokens": 4,
    },
}


def multipliers(networks, settings):
    groups = parameter_groups(
        networks,
        depth=settings["depth"],
        layerwise_decay=settings["layerwise_decay"],
        patch_embed_lr_mult=settings["patch_embed_lr_mult"],
    )
    return {
        name: (g["lr_multiplier"], g["wd_multiplier"], g["last_layer"], list(p.shape))
        for g in groups
        for name, p in zip(g["names"], g["params"], strict=True)
    }


@pytest.mark.parametrize("name", ["vit_small", "vit_large", "vit_giant2"])
def test_multipliers_of_every_parameter(name):
    table = json.loads((DATA / "param_groups.json").read_text())
    reference = table[name]
    with torch.device("meta"):
        backbone = VisionTransformer(**MODELS[name])
    ours = multipliers({"backbone": backbone}, reference | {"depth": MODELS[name]["depth"]})
    assert ours == {
        n: (p["lr_multiplier"], p["wd_multiplier"], False, p["shape"]) for n, p in reference["params"].items()
    }


def test_multipliers_of_a_head():
    reference = json.loads((DATA / "param_groups.json").read_text())["dino_head"]
    with torch.device("meta"):
        head = DINOHead(384, prototypes=64, bottleneck_dim=16, nlayers=3, hidden_dim=32)
    ours = multipliers({"dino_head": head}, {"depth": 12, "layerwise_decay": 0.9, "patch_embed_lr_mult": 0.2})
    assert {name: values[:3] for name, values in ours.items()} == {
        n: (p["lr_multiplier"], p["wd_multiplier"], p["is_last_layer"]) for n, p in reference.items()
    }


@pytest.mark.parametrize("name", ["default", "vitl14"])
def test_schedules(name):
    reference = json.loads((DATA / "schedules.json").read_text())[name]
    overrides = {f"{s}.{k}": v for s, keys in reference["overrides"].items() for k, v in keys.items()}
    overrides |= {"optim.scaling_rule": "none", "train.OFFICIAL_EPOCH_LENGTH": reference["epoch_length"]}
    recipe, _ = load_recipe("dinov2", overrides)
    epochs = reference["total_iterations"] // reference["epoch_length"]
    assert recipe.optim.epochs == epochs
    schedules = build_schedules(recipe, RunLength(reference["total_iterations"], batch_size=64, images=10**6))
    for i, step in enumerate(reference["iterations"]):
        ours = vars(schedules(step))
        for key, values in reference["values"].items():
            assert ours[key] == pytest.approx(values[i], rel=1e-9, abs=1e-12), (step, key)
