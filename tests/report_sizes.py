"""A network and a run of the smallest sizes, for reports."""

SIZES = {
    "student.embed_dim": 48,
    "student.depth": 2,
    "student.num_heads": 2,
    "student.patch_size": 8,
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "crops.local_crops_number": 2,
    "dino.head_n_prototypes": 32,
    "dino.head_hidden_dim": 32,
    "dino.head_bottleneck_dim": 8,
    "train.batch_size_per_gpu": 8,
    "train.steps": 6,
    "train.num_workers": 0,
    "train.threads": 1,
    "log.every_steps": 1,
    "precision": "fp32",
}
