"""The losses as functions of plain logits [N, K] and temperatures, for tests."""

import torch

from dinoforge.data.batch import Share
from dinoforge.kernels import cross_entropy as terms
from dinoforge.kernels import targets
from dinoforge.kernels.tiles import Scratch
from dinoforge.method import targets as centers
from dinoforge.method.dino import dino_terms
from dinoforge.method.ibot import ibot_term


def over(logits, temp):
    """What ``teacher_logits`` makes: over temperature, prototypes first, in memory of its own."""
    return (logits.float() / temp).T.clone(memory_format=torch.contiguous_format)


def last_layer(weight):
    """Lengths and directions of a last layer whose effective weight is this one."""
    return weight.norm(dim=1, keepdim=True), weight


def cross_entropy(parts, weight):
    return terms.cross_entropy(parts, *last_layer(weight), Scratch())


def sinkhorn_knopp(logits, temp, iterations=3):
    return targets.sinkhorn_knopp(over(logits, temp), iterations)


def centering(logits, temp, center):
    return targets.centering(over(logits, temp), center, temp)


def updated_center(center, logits, momentum, temp=0.5):
    return centers.updated_center(center, [over(logits, temp)], temp, momentum)


def dino_loss(global_embeddings, local_embeddings, prototypes, of_teacher, *, local_crops_number, student_temp):
    """The global and the local term, each with its gradient."""
    share = Share(images=len(of_teacher.per_sample) // 2, local_crops=local_crops_number)
    both = dino_terms(global_embeddings, local_embeddings, of_teacher, share, student_temp)
    return tuple(cross_entropy(part, prototypes)[0] if part else torch.zeros(()) for part in both)


def ibot_loss(embeddings, prototypes, of_teacher, masks, student_temp):
    return cross_entropy(
        [ibot_term(embeddings, of_teacher, masks, Share(len(masks) // 2, 0), student_temp)], prototypes
    )[0]
