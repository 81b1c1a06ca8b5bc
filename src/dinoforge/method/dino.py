"""The DINO loss on cls tokens."""

from torch import Tensor

from dinoforge.data.batch import Share
from dinoforge.kernels.ops import Targets, Term


def dino_terms(
    global_embeddings: Tensor,
    local_embeddings: Tensor,
    targets: Targets,
    share: Share,
    student_temp: float,
    global_weight: float = 1.0,
    local_weight: float = 1.0,
) -> tuple[list[Term], list[Term]]:
    """Compare each student crop with the teacher's views of the same image, by cross-entropy.

    A global crop is compared with the teacher's *other* view, a local crop with both views. With L local crops, an
    image has 2 + 2·L pairs. Both terms are divided by this number, so their sum is a mean over pairs.

        for b in range(B):
            for v in range(2): global_loss += H(teacher[1 - v][b], student_global[v][b]) / B / (2 + 2 * L)
            for l in range(L):
                for v in range(2): local_loss += H(teacher[v][b], student_local[l][b]) / B / (2 + 2 * L)

    Source: DINO (arXiv 2104.14294), equation 3.

    Args:
        global_embeddings: The student's bottlenecks of the global crops that the batch has [V·b, d], crop-major.
        local_embeddings: The student's bottlenecks of local crops, all or some [l·b, d], crop-major.
        targets: The teacher's targets for both global crops of the batch's images [2b], crop-major.
        share: The batch's share of the whole batch; B and L are the whole batch's.
        student_temp: The student's temperature.
        global_weight, local_weight: The weights of the two terms in the whole loss.

    Returns:
        The terms whose cross-entropies sum to the global loss, and those of the local loss; no terms for a weight of 0.
    """
    images = len(targets.per_sample) // 2
    pairs = 2 + 2 * share.local_crops
    of_teacher = slice(0, images), slice(images, 2 * images)

    def term(embeddings: Tensor, sources: tuple[slice, ...], weight: float) -> Term:
        weights = embeddings.new_full((images,), weight / (share.images * pairs))
        return Term(embeddings.unflatten(0, (-1, images)), targets, sources, weights, student_temp)

    of_globals, of_locals = [], []
    if global_weight > 0 and len(global_embeddings):
        for view, embeddings in zip(share.views, global_embeddings.split(images), strict=True):
            of_globals.append(term(embeddings, (of_teacher[1 - view],), global_weight))
    if local_weight > 0 and len(local_embeddings):
        of_locals.append(term(local_embeddings, of_teacher, local_weight))
    return of_globals, of_locals
