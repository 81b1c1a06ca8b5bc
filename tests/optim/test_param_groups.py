"""Which parameter gets what, and what AdamW does with it."""

import pytest
import torch
from torch import nn

from dinoforge.models.head import DINOHead
from dinoforge.models.vit import VisionTransformer
from dinoforge.optim.param_groups import parameter_groups, set_hyperparameters

DEPTH, DECAY, PATCH = 3, 0.5, 0.2


def make_networks():
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depth": DEPTH, "num_heads": 2, "patch_size": 4, "image_size": 8}
    head = {"prototypes": 6, "bottleneck_dim": 4, "nlayers": 3, "hidden_dim": 8}
    return {
        "backbone": VisionTransformer(**sizes, num_register_tokens=2, layerscale=0.1),
        "dino_head": DINOHead(8, **head),
        "ibot_head": DINOHead(8, **head | {"nlayers": 1}),
    }


def make_groups(networks, **changes):
    arguments = {"depth": DEPTH, "layerwise_decay": DECAY, "patch_embed_lr_mult": PATCH} | changes
    return parameter_groups(networks, **arguments)


def make_optimizer(networks, *, lr=0.1, last_layer_lr=0.1, weight_decay=0.3, **changes):
    optimizer = torch.optim.AdamW(make_groups(networks, **changes), lr=0.0)
    set_hyperparameters(optimizer, lr=lr, last_layer_lr=last_layer_lr, weight_decay=weight_decay)
    return optimizer


def by_name(groups):
    return {(g["module"], name): g for g in groups for name in g["names"]}


def is_unregularised(networks, module, name):
    """Biases, norms and LayerScale, by the kind of their layer instead of by name."""
    layer, _, parameter = name.rpartition(".")
    kind = networks[module].get_submodule(layer)
    return parameter in ("bias", "gamma") or isinstance(kind, nn.LayerNorm)


def test_every_parameter_is_in_exactly_one_group():
    networks = make_networks()
    groups = make_groups(networks)
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for n in networks.values() for p in n.parameters())
    for group in groups:
        assert len(group["params"]) == len(group["names"])
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert networks[group["module"]].get_parameter(name) is parameter


def test_weight_decay_follows_the_schedule_except_on_biases_norms_and_layerscale():
    networks = make_networks()
    kinds = set()
    for (module, name), group in by_name(make_optimizer(networks).param_groups).items():
        unregularised = is_unregularised(networks, module, name)
        assert group["weight_decay"] == (0.0 if unregularised else 0.3), name
        kinds.add(unregularised)
    assert kinds == {True, False}


@pytest.mark.parametrize("name", ["cls_token", "pos_embed", "mask_token", "register_tokens", "patch_embed.proj.weight"])
def test_tokens_and_positions_are_regularised(name):
    assert by_name(make_optimizer(make_networks()).param_groups)["backbone", name]["weight_decay"] == 0.3


@pytest.mark.parametrize("name", ["last_layer.weight_g", "last_layer.weight_v"])
def test_both_parameters_of_the_last_layer_are_regularised(name):
    group = by_name(make_optimizer(make_networks(), last_layer_lr=0.05).param_groups)["dino_head", name]
    assert (group["weight_decay"], group["lr"]) == (0.3, 0.05)


def test_scope_backbone_leaves_the_heads_at_the_default_of_adamw():
    networks = make_networks()
    default = torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).defaults["weight_decay"]
    assert default == 0.01
    optimizer = make_optimizer(networks, weight_decay_scope="backbone")
    for (module, name), group in by_name(optimizer.param_groups).items():
        expected = 0.3 if module == "backbone" else default
        assert group["weight_decay"] == (0.0 if is_unregularised(networks, module, name) else expected), name


def test_hyperparameters_are_written_anew_each_time():
    optimizer = make_optimizer(make_networks())
    before = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    set_hyperparameters(optimizer, lr=0.9, last_layer_lr=0.0, weight_decay=0.7)
    set_hyperparameters(optimizer, lr=0.1, last_layer_lr=0.1, weight_decay=0.3)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == before


def last_layer(networks, optimizer):
    v = networks["dino_head"].last_layer.weight_v
    return v.detach().clone(), {k: x.detach().clone() for k, x in optimizer.state.get(v, {}).items()}


def fill_gradients(networks):
    for network in networks.values():
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)


def test_frozen_by_lr_the_last_layer_stands_still_while_its_moments_move():
    networks = make_networks()
    optimizer = make_optimizer(networks, last_layer_lr=0.0)
    before, _ = last_layer(networks, optimizer)
    for step in (1, 2):
        fill_gradients(networks)
        optimizer.step()
        after, state = last_layer(networks, optimizer)
        assert torch.equal(after, before)
        assert float(state["step"]) == step
        torch.testing.assert_close(state["exp_avg"], torch.full_like(before, 1 - 0.9**step))
    assert not torch.equal(networks["dino_head"].mlp[0].weight, make_networks()["dino_head"].mlp[0].weight)


def test_frozen_by_gradient_its_moments_stand_still_too():
    networks = make_networks()
    optimizer = make_optimizer(networks)
    fill_gradients(networks)
    optimizer.step()
    before, state = last_layer(networks, optimizer)
    fill_gradients(networks)
    for name in ("dino_head", "ibot_head"):
        for parameter in networks[name].last_layer.parameters():
            parameter.grad = None
    optimizer.step()
    after, later = last_layer(networks, optimizer)
    assert torch.equal(after, before)
    assert all(torch.equal(later[key], state[key]) for key in state)
    assert float(optimizer.state[networks["backbone"].cls_token]["step"]) == 2


def test_a_step_of_adamw_with_its_group_is_the_formula():
    networks = make_networks()
    optimizer = make_optimizer(networks)
    before = {n: p.detach().clone() for n, p in networks["backbone"].named_parameters()}
    groups = by_name(optimizer.param_groups)
    fill_gradients(networks)
    optimizer.step()
    for name, parameter in networks["backbone"].named_parameters():
        group = groups["backbone", name]
        # The first step of Adam has length lr.
        expected = before[name] * (1 - group["lr"] * group["weight_decay"]) - group["lr"]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
