"""Times whole training steps, beside the rate at which the machine multiplies matrices.

    python benchmarks/step.py --work A|B [--dtype fp32|bf16] [--prototypes K] [--steps N] [--json]

A is ViT-S/14 on crops of 224 and 98 pixels, batch 8; B is a small network (width 192, 6 blocks, patch 8) on crops of
64 and 32 pixels, batch 64. Both have 8 local crops, Sinkhorn-Knopp targets, one head for both losses.

The share of the peak is the work of the *reference implementation's* step, whatever this one leaves out or adds, over
step time and GEMM peak: products of linear layers, with masked tokens padded to the upper bound as the reference pads
them; attention is not counted. The peak is the rate of ``torch.mm``, which is what the reference multiplies by; the
linear layers here may be faster (``dinoforge.kernels.products``), so that more than 100 % is possible.
"""

import argparse
import itertools
import json
import os
import statistics

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler otherwise writes to the terminal

import torch

from dinoforge.builders.networks import build_drop_path_rates, vit_size
from dinoforge.planning.bench import StepBench, gemm_peak
from dinoforge.recipe.load import load_recipe, parse_override
from dinoforge.recipe.schema import Recipe
from dinoforge.system.device import peak_memory_gib, resolve_device, resolve_precision

COMMON = {
    "train.centering": "sinkhorn_knopp",
    "crops.local_crops_number": 8,
    "ibot.separate_head": False,
}
WORKS = {
    "A": {
        "student.arch": "vit_small",
        "student.patch_size": 14,
        "student.drop_path_rate": 0.3,
        "crops.global_crops_size": 224,
        "crops.local_crops_size": 98,
        "train.batch_size_per_gpu": 8,
    },
    "B": {
        "student.arch": "vit_custom",
        "student.embed_dim": 192,
        "student.depth": 6,
        "student.num_heads": 3,
        "student.patch_size": 8,
        "student.drop_path_rate": 0.1,
        "crops.global_crops_size": 64,
        "crops.local_crops_size": 32,
        "train.batch_size_per_gpu": 64,
    },
}


def reference_flops(recipe: Recipe) -> float:
    """Operations in the linear layers of the reference's step; a multiplication with its addition counts as two."""
    r, c, batch = recipe, recipe.crops, recipe.train.batch_size_per_gpu
    dim, _, _ = vit_size(recipe)
    patches = [(size // r.student.patch_size) ** 2 for size in (c.global_crops_size, c.local_crops_size)]
    images = [2 * batch, c.local_crops_number * batch]
    block = 2 * 12 * dim**2  # per token: attention's 4 D², the feed-forward layer's 8 D²
    flops = 0.0
    for rate in build_drop_path_rates(r):
        kept = [max(int(n * (1 - rate)), 1) for n in images]
        flops += 3 * block * sum(k * (p + 1) for k, p in zip(kept, patches, strict=True))
        flops += block * images[0] * (patches[0] + 1)  # the teacher
    embed = 2 * r.student.in_chans * r.student.patch_size**2 * dim
    flops += embed * (2 * sum(n * p for n, p in zip(images, patches, strict=True)) + images[0] * patches[0])

    # The reference pads the masked patches to the largest number that the bins of ratios allow.
    masked_crops = int(images[0] * r.ibot.mask_sample_probability)
    bounds = torch.linspace(*r.ibot.mask_ratio_min_max, masked_crops + 1).tolist()
    masked = sum(int(patches[0] * high) for high in bounds[1:])
    d = r.dino
    widths = [dim, *[d.head_hidden_dim] * (d.head_nlayers - 1), d.head_bottleneck_dim, d.head_n_prototypes]
    head = 2 * sum(a * b for a, b in itertools.pairwise(widths))
    return flops + head * (3 * (sum(images) + masked) + images[0] + masked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORKS, default="A")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=6, help="timed steps; default: 6")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="recipe keys laid over the work's")
    options = parser.parse_args()

    keys = COMMON | WORKS[options.work] | {"dino.head_n_prototypes": options.prototypes, "precision": options.dtype}
    recipe, _ = load_recipe("dinov2", keys | dict(parse_override(k) for k in options.keys))
    device = resolve_device(recipe.device)
    dtype = resolve_precision(recipe.precision, device)
    flops = reference_flops(recipe)

    bench = StepBench(recipe, device, dtype)
    bench.run(2)
    times = bench.run(-(-options.steps // 2))
    peak_memory = peak_memory_gib(device)  # before the peak's own matrices are made
    dim = vit_size(recipe)[0]
    tokens, k = 4096, options.prototypes
    shapes = [(tokens, dim, 3 * dim), (tokens, dim, 4 * dim), (tokens, 4 * dim, dim), (512, 256, k)]
    peak = gemm_peak(device, dtype, shapes, by_linear=False)
    ours = gemm_peak(device, dtype, shapes)
    times += bench.run(options.steps // 2)
    step = statistics.median(times)
    result = {
        "work": options.work,
        "dtype": options.dtype,
        "prototypes": k,
        "gflop": flops / 1e9,
        "gemm_gflops": peak / 1e9,
        "linear_gflops": ours / 1e9,
        "step_s": step,
        "images_per_s": recipe.train.batch_size_per_gpu / step,
        "share_of_peak": flops / step / peak,
        "peak_rss_gib": peak_memory,
        "phases_s": bench.phases(),
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"work {options.work}, {options.dtype}, {k:,} prototypes, {device}, {torch.get_num_threads()} threads")
    rows = {
        "work of the reference's step": f"{result['gflop']:.0f} GFLOP",
        "GEMM peak": f"{result['gemm_gflops']:.0f} GFLOP/s by torch.mm, {result['linear_gflops']:.0f} in linear layers",
        "step": f"{step:.3f} s (median of {len(times)}, {min(times):.3f} to {max(times):.3f})",
        "images": f"{result['images_per_s']:.2f} / s",
        "share of peak": f"{result['share_of_peak']:.1%} of the rate of torch.mm",
        "peak memory": f"{peak_memory:.2f} GiB",
    }
    for name, text in rows.items():
        print(f"{name:<30} {text}")
    print("one step by phase:")
    for name, seconds in result["phases_s"].items():
        print(f"  {name:<28} {seconds:.3f} s")


if __name__ == "__main__":
    main()
