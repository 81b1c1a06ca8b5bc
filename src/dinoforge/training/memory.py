"""How much memory a run will take, by part, before it is started."""

from dinoforge.config import Recipe
from dinoforge.student_teacher import StudentTeacher
from dinoforge.training.build import vit_size

# Measured on the CPU: the interpreter, PyTorch and its libraries; buffers of the losses, the optimizer and oneDNN; and
# what the allocator holds beyond the activations that are alive.
_LIBRARIES = 0.6 * 2**30
_BUFFERS = 0.1 * 2**30
_SLACK = 1.3


def estimate(recipe: Recipe, networks: StudentTeacher, *, precision_bytes: int, on_cpu: bool) -> dict[str, float]:
    """Bytes per part of the peak of one process.

    Activations are counted as what the backward pass of each block keeps, for tokens of all student crops, in the
    precision of the products: per token what both LayerNorms read (2 D), queries, keys and values (3 D), what attention
    gave (D), and the hidden layer of the feed-forward network.

    Args:
        recipe: the run.
        networks: on any device, also ``meta``.
        precision_bytes: size of an activation in matrix products: 4, or 2 for half precisions.
        on_cpu: whether the libraries share the memory with the run.
    """
    batch = recipe.train.batch_size_per_gpu
    embed_dim, depth, _ = vit_size(recipe)
    crops, student = recipe.crops, recipe.student
    global_patches = (crops.global_crops_size // student.patch_size) ** 2
    local_patches = (crops.local_crops_size // student.patch_size) ** 2
    extra = 1 + student.num_register_tokens
    global_tokens = 2 * batch * (global_patches + extra)
    tokens = global_tokens + crops.local_crops_number * batch * (local_patches + extra)
    kept = 1 - student.drop_path_rate if student.drop_path_uniform else 1 - student.drop_path_rate / 2
    hidden = embed_dim * student.mlp_ratio
    of_a_block = tokens * kept * precision_bytes * (6 * embed_dim + hidden)
    if recipe.parallel.activation_checkpointing:  # each block's input, and one block's all while it is computed again
        activations = _SLACK * (tokens * depth * 4 * embed_dim + of_a_block)
    else:
        activations = _SLACK * depth * of_a_block

    ratio = sum(recipe.ibot.mask_ratio_min_max) / 2
    masked = 2 * batch * recipe.ibot.mask_sample_probability * ratio * global_patches
    samples = 2 * batch + masked
    parameters = sum(p.numel() for p in networks.student.parameters())
    last_layers = [p for name, p in networks.student.named_parameters() if name.endswith("last_layer.weight_v")]
    prototypes = max((len(p) for p in last_layers), default=0)
    prototype_weights = sum(p.numel() for p in last_layers)
    return {
        "libraries": _LIBRARIES if on_cpu else 0.0,
        "student and teacher": 2 * 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "activations": activations,
        "teacher logits": samples * prototypes * precision_bytes,
        "heads": (samples + crops.local_crops_number * batch) * 3 * recipe.dino.head_hidden_dim * 4
        + 3 * 4 * prototype_weights,
        "buffers": _BUFFERS,
        "checkpoint": (4 * 4 * parameters if recipe.checkpoint.asynchronous and on_cpu else 0) + 2 * 2**26,
        "batches": 3 * batch * recipe.train.accumulate * student.in_chans * 5 * (2 * crops.global_crops_size**2),
    }
