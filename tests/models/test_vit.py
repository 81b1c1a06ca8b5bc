"""The vision transformer: packing, masks, position embeddings, stochastic depth, sizes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dinoforge.kernels import ops
from dinoforge.kernels.attention import AttentionOnCpu, HalfAttentionOnCpu
from dinoforge.kernels.ops import norm_linear, scaled_linear
from dinoforge.kernels.types import Kept
from dinoforge.models.layers import Block, SwiGLU
from dinoforge.models.stochastic_depth import KeptSamples, draw_kept_samples, drop_path_rates, subset_of
from dinoforge.models.vit import SIZES, VisionTransformer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other take longer than these small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_vit(**changes):
    """A small network in which every parameter matters."""
    torch.manual_seed(0)
    arguments = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "image_size": 16} | changes
    network = VisionTransformer(**arguments)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.eval()


def images(count, height=16, width=None, channels=3, seed=0):
    shape = (count, channels, height, width or height)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_equal_tokens(a, b, **tolerance):
    for name in ("cls", "registers", "patches"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance)


# Packing


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 3])
def test_groups_packed_together_equal_each_alone(ffn_layer, registers):
    network = make_vit(ffn_layer=ffn_layer, num_register_tokens=registers)
    large, small, wide = images(3), images(5, 8, seed=1), images(2, 8, 12, seed=2)
    masks = torch.rand(3, 16) < 0.4
    together = network.encode([large, small, wide], [masks, None, None])
    for tokens, (crops, m) in zip(together, [(large, masks), (small, None), (wide, None)], strict=True):
        count = crops.shape[2] * crops.shape[3] // 16
        assert tokens.cls.shape == (len(crops), 16)
        assert tokens.registers.shape == (len(crops), registers, 16)
        assert tokens.patches.shape == (len(crops), count, 16)
        assert_equal_tokens(tokens, network(crops, m), rtol=1e-4, atol=1e-5)


def test_images_do_not_see_each_other():
    network = make_vit()
    batch = images(4)
    alone = [network(batch[i : i + 1]) for i in range(4)]
    together = network(batch)
    torch.testing.assert_close(together.patches, torch.cat([t.patches for t in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.cls, torch.cat([t.cls for t in alone]), rtol=1e-4, atol=1e-5)


def test_tokens_are_normalised_by_the_final_norm():
    network = make_vit()
    nn.init.ones_(network.norm.weight)
    nn.init.zeros_(network.norm.bias)
    patches = network(images(2)).patches
    torch.testing.assert_close(patches.mean(-1), torch.zeros(2, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(patches.var(-1, unbiased=False), torch.ones(2, 16), rtol=1e-3, atol=0)


def test_attention_is_softmax_of_scaled_products():
    network = make_vit(depth=1, layerscale=0.0)
    block = network.blocks[0]
    x = torch.randn(3, 5, 16)
    q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    heads = []
    for h in range(2):
        part = slice(8 * h, 8 * h + 8)
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5, dim=-1)
        heads.append(weights @ v[..., part])
    expected = block.attn.proj(torch.cat(heads, dim=-1))
    ours = block.attn.project(block.attn(x.flatten(0, 1), block.norm1, ((3, 5),)), None)
    torch.testing.assert_close(ours.view(3, 5, 16), expected, rtol=1e-4, atol=1e-5)


# Masks


def change_patch(batch, row, column):
    changed = batch.clone()
    changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    return changed


def test_a_masked_patch_is_not_seen():
    network = make_vit(num_register_tokens=2)
    batch = images(2)
    changed = change_patch(batch, 1, 2)  # patch 6 of the 4 × 4 grid
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[:, 6] = True
    assert_equal_tokens(network(batch, masks), network(changed, masks), rtol=0, atol=0)
    seen, otherwise = network(batch), network(changed)
    assert (seen.cls - otherwise.cls).abs().amax(-1).gt(1e-4).all()
    assert (seen.patches - otherwise.patches).abs().amax(-1).gt(1e-4).all()
    masks = torch.ones(2, 16, dtype=torch.bool)
    masks[:, 6] = False
    assert not torch.equal(network(batch, masks).cls, network(changed, masks).cls)


def test_the_mask_token_stands_at_masked_patches_with_their_positions():
    network = make_vit(depth=0)
    network.norm = nn.Identity()
    masks = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    patches = network(images(2), masks).patches
    unmasked = network(images(2)).patches
    expected = (network.mask_token + network.pos_embed[0, 1:]).expand(2, -1, -1)
    torch.testing.assert_close(patches[masks], expected[masks])
    torch.testing.assert_close(patches[~masks], unmasked[~masks])


def test_no_mask_and_an_empty_mask_are_the_same():
    network = make_vit()
    empty = torch.zeros(2, 16, dtype=torch.bool)
    assert_equal_tokens(network(images(2), empty), network(images(2)), rtol=0, atol=0)


# Position embeddings


def positions(network, height, width):
    """The position embeddings that a network adds to the patches of an image of that size."""
    network.blocks, network.norm = nn.ModuleList(), nn.Identity()
    nn.init.zeros_(network.patch_embed.proj.weight)
    nn.init.zeros_(network.patch_embed.proj.bias)
    return network(images(1, height, width))


def cubic(distance, a=-0.75):
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def cubic_matrix(target, source, scale):
    """Rows of weights [target, source] of bicubic resampling along one axis, with repeated edges."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        at = (i + 0.5) / scale - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            matrix[i, min(max(j, 0), source - 1)] += cubic(at - j)
    return matrix


def test_the_native_size_takes_the_position_embeddings_as_they_are():
    network = make_vit()
    tokens = positions(network, 16, 16)
    torch.testing.assert_close(tokens.patches, network.pos_embed[:, 1:], rtol=0, atol=0)
    torch.testing.assert_close(tokens.cls, (network.cls_token + network.pos_embed[:, :1])[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (4, 6), (7, 3), (3, 4), (9, 9), (1, 1)])
def test_other_sizes_resample_bicubically(rows, columns, offset):
    network = make_vit(interpolate_offset=offset)
    ours = positions(network, 4 * rows, 4 * columns)
    vertical = cubic_matrix(rows, 4, (rows + offset) / 4)
    horizontal = cubic_matrix(columns, 4, (columns + offset) / 4)
    grid = network.pos_embed[0, 1:].detach().double().view(4, 4, 16)
    expected = torch.einsum("ri,cj,ijd->rcd", vertical, horizontal, grid).reshape(1, rows * columns, 16)
    torch.testing.assert_close(ours.patches.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.cls, (network.cls_token + network.pos_embed[:, :1])[:, 0])


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (6, 3), (8, 8)])
def test_resampling_agrees_with_interpolate(rows, columns, offset, antialias):
    network = make_vit(interpolate_offset=offset, interpolate_antialias=antialias)
    ours = positions(network, 4 * rows, 4 * columns).patches
    grid = network.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    size = {"scale_factor": ((rows + offset) / 4, (columns + offset) / 4)} if offset else {"size": (rows, columns)}
    expected = F.interpolate(grid, mode="bicubic", antialias=antialias, **size).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_antialiasing_matters_when_the_grid_shrinks():
    a, b = (positions(make_vit(interpolate_antialias=on), 8, 8).patches for on in (False, True))
    assert (a - b).abs().max() > 0.01


@pytest.mark.parametrize("side", [8, 16, 28])
def test_register_tokens_get_no_position(side):
    network = make_vit(num_register_tokens=3)
    tokens = positions(network, side, side)
    torch.testing.assert_close(tokens.registers, network.register_tokens, rtol=0, atol=0)


def test_position_embeddings_learn_at_any_size():
    for side in (16, 8, 28):
        network = make_vit()
        network(images(1, side)).cls.sum().backward()
        assert network.pos_embed.grad.abs().sum(-1).gt(0).all()


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), side=st.integers(1, 37))
@settings(max_examples=30, deadline=None)
def test_the_resampled_grid_has_the_size_of_the_image(rows, columns, side):
    network = VisionTransformer(embed_dim=2, depth=0, num_heads=1, patch_size=2, image_size=2 * side, in_chans=1)
    assert network(torch.zeros(1, 1, 2 * rows, 2 * columns)).patches.shape == (1, rows * columns, 2)


# Stochastic depth


@given(
    rates=st.lists(st.floats(0, 0.99), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=30, deadline=None)
def test_draws_are_distinct_images_of_the_stated_number(rates, sizes, seed):
    drawn = draw_kept_samples(rates, sizes, torch.Generator().manual_seed(seed))
    again = draw_kept_samples(rates, sizes, torch.Generator().manual_seed(seed))
    assert len(drawn) == len(rates)
    for rate, block, repeated in zip(rates, drawn, again, strict=True):
        for branch, other in ((block.attn, repeated.attn), (block.ffn, repeated.ffn)):
            assert [len(kept.images) for kept in branch] == [max(int(size * (1 - rate)), 1) for size in sizes]
            for (kept, scale), (same, _), size in zip(branch, other, sizes, strict=True):
                assert torch.equal(kept, same)
                assert len(set(kept.tolist())) == len(kept)
                assert int(kept.min()) >= 0
                assert int(kept.max()) < size
                assert scale == size / len(kept)


def test_what_is_kept_of_a_part_of_a_group_keeps_its_scale():
    (drawn,) = draw_kept_samples([0.25], [8, 4], torch.Generator().manual_seed(0))
    halves = [drawn.of([(0, slice(start, start + 4))]) for start in (0, 4)]
    again = torch.cat([half.attn[0].images + start for half, start in zip(halves, (0, 4), strict=True)])
    assert sorted(again.tolist()) == sorted(drawn.attn[0].images.tolist())
    assert {kept.scale for half in halves for kept in (*half.attn, *half.ffn)} == {8 / 6}
    (other,) = drawn.of([(1, slice(0, 4))]).ffn
    assert torch.equal(other.images, drawn.ffn[1].images)


def test_branches_blocks_and_groups_draw_for_themselves():
    drawn = draw_kept_samples([0.5, 0.5], [64, 64], torch.Generator().manual_seed(0))
    sets = [frozenset(kept.images.tolist()) for block in drawn for branch in (block.attn, block.ffn) for kept in branch]
    assert len(set(sets)) == 8
    other = draw_kept_samples([0.5, 0.5], [64, 64], torch.Generator().manual_seed(1))
    assert frozenset(other[0].attn[0].images.tolist()) != sets[0]


def test_each_image_is_kept_equally_often():
    generator, draws, size = torch.Generator().manual_seed(0), 2000, 10
    counts = torch.zeros(size)
    for block in draw_kept_samples([0.3] * draws, [size], generator):
        counts[block.attn[0].images] += 1
    deviation = (draws * 0.7 * 0.3) ** 0.5
    assert (counts - 0.7 * draws).abs().max() < 6 * deviation


def make_block(swiglu=False):
    torch.manual_seed(1)
    block = Block(8, 2, 16, swiglu=swiglu, layerscale=1.0, qkv_bias=True, proj_bias=True, ffn_bias=True)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    return block


def branch_of(block, x, kind):
    """One residual branch on images [B, N, D]."""
    if kind == "attn":
        attended = block.attn(x.flatten(0, 1), block.norm1, ((x.shape[0], x.shape[1]),))
        return block.attn.project(attended, block.ls1.gamma).view_as(x)
    return block.mlp(x.flatten(0, 1), block.norm2, block.ls2.gamma).view_as(x)


@pytest.mark.parametrize("swiglu", [False, True])
def test_a_branch_with_a_subset_is_that_branch_of_the_kept_images_scaled(swiglu):
    block = make_block(swiglu)
    shapes = [(4, 5), (6, 3)]  # images, tokens of two groups
    parts = [torch.randn(*shape, 8) for shape in shapes]
    kept_attn = [Kept(torch.tensor([2, 0, 3]), 4 / 3), Kept(torch.tensor([5]), 6.0)]
    kept_ffn = [Kept(torch.tensor([1]), 4.0), Kept(torch.tensor([4, 0]), 3.0)]
    device = torch.device("cpu")
    packed = torch.cat([p.flatten(0, 1) for p in parts])
    groups = tuple(shapes)
    ours = block(packed, groups, subset_of(kept_attn, groups, device), subset_of(kept_ffn, groups, device))

    expected = []
    for x, attn, ffn in zip(parts, kept_attn, kept_ffn, strict=True):
        x = x.clone()
        for kept, kind in ((attn, "attn"), (ffn, "ffn")):
            added = branch_of(block, x[kept.images], kind) * kept.scale
            x = x.clone()
            for position, image in enumerate(kept.images.tolist()):
                x[image] = x[image] + added[position]
        expected.append(x.flatten(0, 1))
    torch.testing.assert_close(ours, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_rate_zero_is_no_stochastic_depth():
    network = make_vit()
    crops = [images(4), images(6, 8)]
    kept = draw_kept_samples([0.0, 0.0], [4, 6], torch.Generator().manual_seed(0))
    for a, b in zip(network.encode(crops, [None, None], kept), network.encode(crops, [None, None]), strict=True):
        assert_equal_tokens(a, b, rtol=0, atol=0)


@pytest.fixture(params=["fast", "plain"])
def kernels(request):
    with ops.using(request.param):
        yield


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_of_which_nothing_is_kept(dtype):
    network = make_vit()
    nothing, second = Kept(torch.tensor([], dtype=torch.int64), 3.0), Kept(torch.tensor([1]), 3.0)
    for kept in ([nothing], [nothing, second]):
        crops = [images(3), images(3)][: len(kept)]
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            tokens = network.encode_some(
                crops, [None] * len(kept), [torch.tensor([0, 5])] * len(kept), [KeptSamples(attn=kept, ffn=kept)] * 2
            )
        sum(part.sum() for group in tokens for part in group).backward()
        bare = make_vit(depth=0)
        bare.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("blocks.")})
        torch.testing.assert_close(tokens[0][0], bare(images(3)).cls, check_dtype=False)


def test_images_that_no_branch_keeps_pass_unchanged():
    network = make_vit()
    kept = [KeptSamples(attn=[Kept(torch.tensor([1]), 3.0)], ffn=[Kept(torch.tensor([1]), 3.0)])] * 2
    (tokens,) = network.encode([images(3)], [None], kept)
    bare = make_vit(depth=0)
    bare.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("blocks.")})
    embedded = bare(images(3))
    torch.testing.assert_close(tokens.patches[[0, 2]], embedded.patches[[0, 2]])
    assert (tokens.patches[1] - embedded.patches[1]).abs().max() > 1e-2


def test_dropped_images_give_the_branch_no_gradient():
    network = make_vit(depth=1)
    batch = images(3).requires_grad_()
    kept = [KeptSamples(attn=[Kept(torch.tensor([1]), 3.0)], ffn=[Kept(torch.tensor([1]), 3.0)])]
    (tokens,) = network.encode([batch], [None], kept)
    tokens.cls[[0, 2]].sum().backward()
    assert network.blocks[0].attn.qkv.weight.grad.abs().max() == 0
    assert network.cls_token.grad.abs().max() > 0


def test_rates_of_the_blocks():
    assert drop_path_rates(0.3, 4, uniform=True) == [0.3] * 4
    assert drop_path_rates(0.3, 4, uniform=False) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1, uniform=False) == [0.0]
    assert drop_path_rates(0.0, 3, uniform=False) == [0.0] * 3


# Sizes

# embed_dim, depth, feed-forward layer, parameters of the published backbones with 14-pixel patches at 518 pixels.
PUBLISHED = {
    "vit_small": (384, 12, "mlp", 22_056_576),
    "vit_base": (768, 12, "mlp", 86_580_480),
    "vit_large": (1024, 24, "mlp", 304_368_640),
    "vit_giant2": (1536, 40, "swiglufused", 1_136_480_768),
}


def count_by_hand(
    d, depth, patch, side, channels=3, registers=0, ffn="mlp", ratio=4.0, layerscale=True, bias=(1, 1, 1)
):
    qkv, proj, ffn_bias = bias
    hidden = int(d * ratio)
    if ffn == "mlp":
        feed_forward = 2 * d * hidden + ffn_bias * (hidden + d)
    else:
        hidden = math.ceil(int(hidden * 2 / 3) / 8) * 8
        feed_forward = 3 * d * hidden + ffn_bias * (2 * hidden + d)
    block = 2 * (2 * d) + 3 * d * d + qkv * 3 * d + d * d + proj * d + feed_forward + layerscale * 2 * d
    tokens = d + d + registers * d + (1 + (side // patch) ** 2) * d  # cls, mask, registers, positions
    return channels * patch * patch * d + d + tokens + depth * block + 2 * d


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    d, depth, ffn, parameters = PUBLISHED[name]
    embed_dim, blocks, heads = SIZES[name]
    assert (embed_dim, blocks, embed_dim // heads) == (d, depth, 64)
    with torch.device("meta"):
        network = VisionTransformer(
            embed_dim=embed_dim, depth=blocks, num_heads=heads, patch_size=14, image_size=518, ffn_layer=ffn
        )
    assert count(network) == count_by_hand(d, depth, 14, 518, ffn=ffn) == parameters


def test_every_size_is_tested():
    assert set(SIZES) == {*PUBLISHED, "vit_tiny"}
    assert SIZES["vit_tiny"] == (192, 12, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 1},
        {"channels": 7, "registers": 4},
        {"ratio": 2.5},
        {"ffn": "swiglu", "ratio": 3.0},
        {"layerscale": False},
        *[{"bias": bias} for bias in itertools.product((0, 1), repeat=3)],
        {"bias": (0, 1, 0), "ffn": "swiglu"},
    ],
)
def test_parameters_by_switches(changes):
    qkv, proj, ffn_bias = map(bool, changes.get("bias", (1, 1, 1)))
    network = VisionTransformer(
        embed_dim=24,
        depth=2,
        num_heads=3,
        patch_size=4,
        image_size=12,
        in_chans=changes.get("channels", 3),
        num_register_tokens=changes.get("registers", 0),
        ffn_layer=changes.get("ffn", "mlp"),
        mlp_ratio=changes.get("ratio", 4.0),
        layerscale=1e-5 if changes.get("layerscale", True) else 0.0,
        qkv_bias=qkv,
        proj_bias=proj,
        ffn_bias=ffn_bias,
    )
    assert count(network) == count_by_hand(24, 2, 4, 12, **changes)
    names = {name for name, _ in network.named_parameters()}
    assert ("blocks.0.attn.qkv.bias" in names) == qkv
    assert ("blocks.0.attn.proj.bias" in names) == proj
    assert {n for n in names if n.startswith("blocks.0.mlp") and n.endswith("bias")} != set() or not ffn_bias
    assert ("blocks.1.ls2.gamma" in names) == changes.get("layerscale", True)
    assert ("register_tokens" in names) == ("registers" in changes)
    channels = changes.get("channels", 3)
    assert network(torch.randn(2, channels, 8, 12)).patches.shape == (2, 6, 24)


@given(dim=st.integers(2, 2000), ratio=st.sampled_from([1.0, 2.0, 2.5, 4.0]))
@settings(max_examples=30, deadline=None)
def test_swiglu_width_is_two_thirds_rounded_up_to_eight(dim, ratio):
    with torch.device("meta"):
        layer = SwiGLU(dim, int(dim * ratio), bias=True)
    width = layer.w3.in_features
    wanted = int(int(dim * ratio) * 2 / 3)
    assert layer.w12.out_features == 2 * width
    assert width % 8 == 0
    assert wanted <= width < wanted + 8


def test_swiglu_gates_with_the_first_half():
    torch.manual_seed(0)
    layer = SwiGLU(6, 12, bias=True)
    norm, scale = nn.LayerNorm(6), torch.rand(6)
    x = torch.randn(5, 6)
    w, b = layer.w12.weight, layer.w12.bias
    gate, value = norm(x) @ w[:8].T + b[:8], norm(x) @ w[8:].T + b[8:]
    torch.testing.assert_close(layer(x, norm, scale), scale * layer.w3(gate * torch.sigmoid(gate) * value))


def test_layerscale_starts_at_its_value():
    network = VisionTransformer(embed_dim=8, depth=1, num_heads=1, patch_size=4, image_size=8, layerscale=0.25)
    assert network.blocks[0].ls1.gamma.unique().tolist() == [0.25]
    assert network.blocks[0].ls2.gamma.unique().tolist() == [0.25]


# Errors


def test_sizes_that_do_not_fit_together():
    with pytest.raises(ValueError, match="num_heads"):
        make_vit(embed_dim=15)
    with pytest.raises(ValueError, match="patch_size"):
        make_vit(image_size=17)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 15, 16), (2, 3, 16, 18)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="3 channels and sides that are multiples of 4"):
        make_vit()(torch.zeros(shape))


@pytest.mark.parametrize("offset", [-0.1, 1.0])
def test_an_offset_that_would_change_the_grid_is_refused(offset):
    with pytest.raises(ValueError, match="interpolate_offset"):
        make_vit(interpolate_offset=offset)


@pytest.mark.parametrize("rates", [None, [0.4, 0.4, 0.4], [0.0, 0.2, 0.5]])
@pytest.mark.parametrize("settings", [{}, {"layerscale": 0.0}, {"num_register_tokens": 2, "ffn_layer": "swiglu"}])
@pytest.mark.parametrize("masked_share", [0.0, 0.3])
def test_some_tokens_are_those_of_all_with_the_same_gradients(rates, settings, masked_share):
    torch.manual_seed(0)
    network = VisionTransformer(embed_dim=16, depth=3, num_heads=2, patch_size=4, image_size=16, **settings)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    crops = [torch.randn(6, 3, 16, 16), torch.randn(10, 3, 8, 8)]
    masks = torch.rand(6, 16) < masked_share
    masked = masks.flatten().nonzero()[:, 0]
    kept = rates and draw_kept_samples(rates, [6, 10], torch.Generator().manual_seed(1))

    whole = network.encode(crops, [masks, None], kept)
    expected = [whole[0].cls, whole[0].patches.flatten(0, 1)[masked], whole[1].cls]
    (cls, patches), (local_cls, none) = network.encode_some(crops, [masks, None], [masked, None], kept)
    assert none.shape == (0, 16)
    gradients = []
    for outputs in ([cls, patches, local_cls], expected):
        loss = sum((x * torch.arange(x.numel()).view_as(x).cos()).sum() for x in outputs)
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    for ours, theirs in zip([cls, patches, local_cls], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_layers_and_their_gradients_are_those_of_plain_ones(gelu, bias):
    torch.manual_seed(0)
    norm, first, second = nn.LayerNorm(6).double(), nn.Linear(6, 8, bias).double(), nn.Linear(8, 6, bias).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    scale = torch.randn(6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    ours = scaled_linear(norm_linear(x, norm, first), second, scale, gelu=gelu)
    hidden = first(norm(x))
    expected = second(F.gelu(hidden) if gelu else hidden) * scale
    torch.testing.assert_close(ours, expected)
    leaves = [x, scale, *norm.parameters(), *first.parameters(), *second.parameters()]
    weights = torch.randn(5, 6, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("dtype", "function"),
    [(torch.float32, AttentionOnCpu), (torch.float64, AttentionOnCpu), (torch.bfloat16, HalfAttentionOnCpu)],
)
@pytest.mark.parametrize("groups", [((2, 5), (3, 4)), ((16, 200), (1, 30))], ids=["few", "many"])
def test_attention_on_the_cpu_is_scaled_dot_product_attention_per_group(groups, dtype, function):
    torch.manual_seed(0)
    heads, sizes = 2, [images * tokens for images, tokens in groups]
    qkv = torch.randn(sum(sizes), 24, dtype=dtype, requires_grad=True)
    weights = torch.randn(sum(sizes), 8)
    parts = []
    for part, (images, tokens) in zip(qkv.float().split(sizes), groups, strict=True):
        q, k, v = part.view(images, tokens, 3, heads, 4).permute(2, 0, 3, 1, 4)
        parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(images * tokens, 8))
    expected = torch.cat(parts)
    ours = function.apply(qkv, groups, heads)
    assert ours.dtype is dtype
    bound = {"rtol": 0.02, "atol": 0.02} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours.float(), expected, **bound)
    (mine,) = torch.autograd.grad((ours.float() * weights).sum(), qkv)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), qkv)
    torch.testing.assert_close(mine.float(), theirs.float(), **bound)


@torch.no_grad()
def test_intermediate_layers():
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "num_heads": 2, "patch_size": 4, "image_size": 16, "num_register_tokens": 2}
    network = VisionTransformer(**sizes, depth=3, layerscale=1.0).eval()
    images = torch.randn(2, 3, 8, 12)
    tokens = network(images)
    ((patches, cls),) = network.get_intermediate_layers(images, return_class_token=True)
    assert torch.equal(patches, tokens.patches)
    assert torch.equal(cls, tokens.cls)
    # A network that ends after the second block gives what the second block of the whole one gives.
    shorter = VisionTransformer(**sizes, depth=2, layerscale=1.0).eval()
    shorter.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("blocks.2.")})
    middle, last = network.get_intermediate_layers(images, [1, 2], reshape=True)
    assert middle.shape == (2, 16, 2, 3)
    assert torch.equal(middle.flatten(2).transpose(1, 2), shorter(images).patches)
    assert torch.equal(last[:, :, 1, 0], tokens.patches[:, 3])
    (raw,) = network.get_intermediate_layers(images, norm=False)
    assert torch.equal(network.norm(raw), tokens.patches)
    for n in (0, 4, [3], []):
        with pytest.raises(ValueError, match="blocks from 0 to 2"):
            network.get_intermediate_layers(images, n)
