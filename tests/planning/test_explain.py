"""``dinoforge explain``: what is said is what training does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinoforge.builders.lengths import build_schedules, run_length
from dinoforge.builders.networks import build_drop_path_rates, build_optimizer, build_student_teacher
from dinoforge.cli.main import main
from dinoforge.data.batch import Batch, masked_patches
from dinoforge.errors import DinoforgeError, RecipeError
from dinoforge.kernels import cross_entropy, ops, products, targets
from dinoforge.models.stochastic_depth import draw_kept_samples
from dinoforge.optim.param_groups import set_hyperparameters
from dinoforge.planning.explain import IMAGENET_1K, explain, explanation_json, explanation_text, plot_schedules
from dinoforge.planning.work import measure_masks, work_of_a_step
from dinoforge.recipe.load import load_recipe, recipe_names
from dinoforge.training.pieces import crop_counts

FILES = sorted((Path(__file__).parents[1] / "recipe" / "official").glob("*.yaml"))
SMALL = {
    "student.embed_dim": 24,
    "student.depth": 3,
    "student.num_heads": 3,
    "student.patch_size": 8,
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "crops.local_crops_number": 3,
    "dino.head_n_prototypes": 64,
    "dino.head_hidden_dim": 32,
    "dino.head_bottleneck_dim": 16,
    "ibot.head_n_prototypes": 48,
    "ibot.head_hidden_dim": 20,
    "train.batch_size_per_gpu": 4,
}


def small(**changes):
    return load_recipe("small", SMALL | {k.replace("__", "."): v for k, v in changes.items()})[0]


def printed(arguments, capsys):
    assert main(["explain", *arguments]) == 0
    return capsys.readouterr().out


def by_parameter(answer):
    return {(g["module"], name): g for g in answer["groups"] for name in g["params"]}


@pytest.mark.parametrize("step", [0, "frozen", "last"])
@pytest.mark.parametrize("recipe", [*recipe_names(), *map(str, FILES)], ids=lambda r: Path(r).stem)
def test_every_parameter_of_every_recipe(recipe, step, capsys):
    values = load_recipe(recipe)[0]
    schedules = build_schedules(values, run_length(values, images=IMAGENET_1K))
    frozen = schedules.freeze_last_layer_steps
    number = {0: 0, "frozen": frozen - 1, "last": schedules.total_steps - 1}[step]
    arguments = ["--recipe", recipe, "--step", "last" if step == "last" else str(number)]
    out = printed([*arguments, "--json"], capsys)
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert list(answer) == ["step", "groups", "schedules", "masks"]
    assert answer["step"] == number
    now = schedules(number)
    assert answer["schedules"]["at_step"] == vars(now)
    parameters = by_parameter(answer)
    heads = {"dino_head", "ibot_head"} if values.ibot.separate_head else {"dino_head"}
    assert {module for module, _ in parameters} == {"backbone", *heads}
    for (module, name), group in parameters.items():
        assert list(group) == "module rule params lr weight_decay lr_multiplier wd_multiplier last_layer".split()
        regularised = not (name.endswith((".bias", ".gamma")) or "norm" in name)
        assert group["weight_decay"] == (now.weight_decay if regularised else 0), name
        assert group["wd_multiplier"] == float(regularised)
        assert group["last_layer"] == name.startswith("last_layer.")
        if module != "backbone":
            assert group["lr_multiplier"] == 1
        if group["last_layer"] and number < frozen and values.optim.freeze_last_layer == "lr":
            assert group["lr"] == 0
        else:
            held = now.backbone_lr_mult if module == "backbone" else 1.0
            assert group["lr"] == now.lr * group["lr_multiplier"] * held
        assert group["lr"] > 0 or number < max(frozen, schedules.freeze_backbone_steps)
    assert parameters["backbone", "cls_token"]["weight_decay"] > 0


def test_layerwise_multipliers_of_the_default_recipe(capsys):
    parameters = by_parameter(json.loads(printed(["--recipe", "dinov2", "--json"], capsys)))
    blocks = [group["lr_multiplier"] for (_, name), group in parameters.items() if name.endswith("qkv.weight")]
    assert blocks == pytest.approx([0.9 ** (24 - i) for i in range(24)])
    assert parameters["backbone", "patch_embed.proj.weight"]["lr_multiplier"] == pytest.approx(0.2 * 0.9**25)


def test_the_frozen_last_layer(capsys):
    frozen, free = (
        by_parameter(json.loads(printed(["--recipe", "dinov2", "--step", str(step), "--json"], capsys)))
        for step in (1249, 1250)
    )
    for name in ("last_layer.weight_g", "last_layer.weight_v"):
        assert frozen["dino_head", name]["lr"] == 0
        assert free["dino_head", name]["lr"] == free["dino_head", "mlp.0.weight"]["lr"] > 0
    assert frozen["dino_head", "mlp.0.weight"]["lr"] > 0


def test_freezing_by_gradient_is_said(capsys):
    for step, said in ((1249, True), (1250, False)):
        arguments = ["--recipe", "bernoulli", "--step", str(step)]
        answer = json.loads(printed([*arguments, "--json"], capsys))
        assert answer["schedules"]["at_step"]["last_layer_frozen"] is said
        rules = {g["rule"] for g in answer["groups"] if g["last_layer"]}
        assert all(("gradient is dropped" in rule) == said for rule in rules)
        assert "dropping its gradient after clipping" in printed(arguments, capsys)


def test_heads_without_scheduled_weight_decay_are_seen(capsys):
    out = printed(["--recipe", "dinov2", "--step", "last", "--json", "optim.weight_decay_scope=backbone"], capsys)
    for (module, name), group in by_parameter(json.loads(out)).items():
        if group["wd_multiplier"]:
            assert group["weight_decay"] == (pytest.approx(0.4) if module == "backbone" else 0.01), name
            assert ("weight_decay_scope" in group["rule"]) == (module != "backbone")


def test_groups_are_those_of_the_optimizer():
    recipe = small(ibot__separate_head=True, optim__layerwise_decay=0.7)
    e = explain(recipe, images=1000, step=3)
    optimizer = build_optimizer(recipe, build_student_teacher(recipe))
    hyper = e.schedules(3)
    set_hyperparameters(optimizer, lr=hyper.lr, last_layer_lr=hyper.last_layer_lr, weight_decay=hyper.weight_decay)
    assert [(g.module, g.params, g.lr, g.weight_decay) for g in e.groups] == [
        (g["module"], g["names"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups
    ]


def test_the_schedules_in_json():
    s = explanation_json(explain(load_recipe("dinov2")[0]))["schedules"]
    assert (s["total_steps"], s["warmup_steps"], s["teacher_temp_steps"]) == (125_000, 12_500, 37_500)
    assert (s["freeze_last_layer_steps"], s["freeze_last_layer"]) == (1250, "lr")
    assert (s["steps"][0], s["steps"][-1]) == (0, 124_999)
    assert 24 <= len(s["steps"]) <= 60
    for field in ("lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp", "last_layer_frozen"):
        assert len(s[field]) == len(s["steps"])
    assert explanation_json(explain(small(train__steps=3), images=100))["schedules"]["steps"] == [0, 1, 2]


def test_images_and_batch():
    recipe = load_recipe("dinov2")[0]
    e = explain(recipe, images=10_000, batch=1024)
    assert (e.processes, e.recipe.train.batch_size_per_gpu) == (16, 64)
    assert e.schedules.lr == pytest.approx(0.004)
    assert "16 processes × 64" in explanation_text(e)
    e = explain(recipe, images=10_000, batch=100)
    assert (e.processes, e.recipe.train.batch_size_per_gpu) == (1, 100)
    assert e.length.epochs == pytest.approx(1250)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "5000"], "expected 0 to 4999 or last"),
        (["--step=-1"], "expected 0 to 4999 or last"),
        (["--images", "10"], "larger than the data"),
        (["--images", "0"], "--images: expected at least 1"),
        (["--batch", "0"], "--batch: expected at least 1"),
        (["--plot", "curves.pdf"], ".png or .svg"),
        (["--plot", "no/such/folder/curves.png"], "cannot write"),
        (["optim.layer_decay=1"], "did you mean optim.layerwise_decay"),
        (["--recipe", "dinov2", "train.steps=100"], "make the run longer"),
    ],
)
def test_errors(arguments, message, capsys):
    assert main(["explain", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("device", "compute"), [("cpu", "cpu"), ("cuda:1", "cuda, bfloat16"), ("mps", "mps, float32")])
def test_the_device_need_not_be_here(device, compute):
    explanation = explain(load_recipe("small", {"device": device})[0], images=1000)
    assert explanation.compute.startswith(compute)
    with pytest.raises(RecipeError, match="expected auto"):
        explain(load_recipe("small", {"device": "tpu"})[0], images=1000)


def test_a_step_is_a_number_or_last(capsys):
    with pytest.raises(SystemExit):
        main(["explain", "--step", "first"])
    assert "expected a number from 0, or last, got 'first'" in capsys.readouterr().err


@pytest.mark.processes
def test_a_mistyped_key_is_answered_before_torch_is_there():
    code = "import sys; from dinoforge.cli.main import main; main(['explain', 'a.b=1']); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plots(tmp_path):
    e = explain(small(), images=1000)
    plot_schedules(e, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    plot_schedules(e, tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DinoforgeError, match=r"pip install 'dinoforge\[plot\]'"):
        plot_schedules(explain(small(), images=1000), tmp_path / "curves.png")


def test_masks_are_measured():
    block = measure_masks(load_recipe("dinov2")[0], batch=64)
    assert (block.grid, block.masked_crops) == ((14, 14), 0.5)
    assert block.crops >= 500
    assert 0.05 < block.ratio_min < 0.12
    assert 0.45 < block.ratio_max <= 0.5
    assert block.ratio_mean == pytest.approx(0.3, abs=0.01)
    assert block.masked_tokens_per_batch == pytest.approx(64 * 196 * block.ratio_mean, rel=1e-6)
    bernoulli = measure_masks(load_recipe("bernoulli")[0], batch=64)
    assert bernoulli.masked_crops == 1
    assert bernoulli.ratio_mean == pytest.approx(0.3, abs=0.01)
    none = measure_masks(small(ibot__mask_sample_probability=0), batch=4)
    assert (none.masked_crops, none.ratio_mean, none.masked_tokens_per_batch) == (0, 0, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ibot__separate_head": True, "student__ffn_layer": "swiglu", "student__num_register_tokens": 2},
        {"student__drop_path_rate": 0.4},
        {"crops__local_crops_number": 0},
        {"dino__local_loss_weight": 0, "dino__koleo_loss_weight": 0, "ibot__targets": "sinkhorn_knopp"},
        {"dino__loss_weight": 0},
        {"ibot__loss_weight": 0, "student__mlp_ratio": 2},
        {"dino__loss_weight": 0, "ibot__loss_weight": 0},
    ],
    ids=str,
)
def test_the_work_is_what_a_step_computes(monkeypatch, changes):
    """Against PyTorch's counter of the products that a real forward and backward pass runs, without what is padded."""
    for module in (ops, targets, cross_entropy):
        monkeypatch.setattr(module, "padded", lambda count, multiple=32: count)
    recipe = small(**changes)
    c, b = recipe.crops, recipe.train.batch_size_per_gpu
    masks = torch.zeros(2 * b, (c.global_crops_size // 8) ** 2, dtype=torch.bool)
    masks[::2, :5] = True
    batch = Batch(
        global_crops=torch.randn(2 * b, 3, c.global_crops_size, c.global_crops_size),
        local_crops=torch.randn(c.local_crops_number * b, 3, c.local_crops_size, c.local_crops_size),
        masks=masks,
        masked=masked_patches(masks),
        indices=torch.arange(b),
    )
    networks = build_student_teacher(recipe)
    sizes = crop_counts(networks.objective, batch)
    kept = draw_kept_samples(build_drop_path_rates(recipe), sizes, torch.Generator().manual_seed(0))
    aten = torch.ops.aten
    counted = {
        aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, *_, **__: _attention(q),
        # A backward pass is said to cost twice the forward pass, though this one computes the weights once more.
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, *_, **__: 2 * _attention(grad),
    }
    if products._BY_ONEDNN:  # elsewhere there may be no such operator
        counted[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, **__: 2 * x[0] * x[1] * weight[0]
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        networks(batch, teacher_temp=0.05, kept=kept).total.backward()
    work = work_of_a_step(recipe, networks, masked=float(masks.sum()))
    # Which masked patches belong to images that the last block keeps is a matter of luck.
    close = 0.02 if recipe.student.drop_path_rate else 1e-9
    assert sum(w.flops for w in work) == pytest.approx(counter.get_total_flops(), rel=close)


def _attention(shape):
    images, heads, tokens, width = shape
    return 4 * images * heads * tokens**2 * width
