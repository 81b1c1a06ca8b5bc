"""The DINO loss on cls tokens."""

from collections.abc import Sequence

from torch import Tensor

from dinoforge.kernels.types import Targets, Term


def dino_terms(
    global_embeddings: Tensor,
    local_embeddings: Tensor,
    targets: Targets,
    *,
    local_crops_number: int,
    student_temp: float,
    views: Sequence[int] = (0, 1),
    global_weight: float = 1.0,
    local_weight: float = 1.0,
) -> tuple[list[Term], list[Term]]:
    """Cross-entropy of each student crop with the teacher's view of the same image.

    A global crop is held against the teacher's *other* view, a local crop against both. With L local crops there
    are 2 + 2·L pairs for an image; both terms are divided by that number, so together they are a mean over pairs.

        for b in range(B):
            for v in range(2): global_loss += H(teacher[1 - v][b], student_global[v][b]) / B / (2 + 2 * L)
            for l in range(L):
                for v in range(2): local_loss += H(teacher[v][b], student_local[l][b]) / B / (2 + 2 * L)

    Source: DINO (arXiv 2104.14294), equation 3.

    Args:
        global_embeddings: student bottlenecks of the global crops ``views`` [V·B, d], crop-major.
        local_embeddings: of local crops [l·B, d], crop-major, all or some of them. Either is empty if its term is not
            wanted.
        targets: of the teacher's cls tokens of the global crops [2B], crop-major.
        local_crops_number: L, 0 or more.
        student_temp: the student's temperature.
        views: which of the two global crops the student's are.
        global_weight, local_weight: of the two terms in the whole loss.

    Returns:
        What the global and the local loss are sums of, see ``cross_entropy``; nothing where the weight is 0.
    """
    batch = len(targets.per_sample) // 2
    pairs = 2 + 2 * local_crops_number
    of_teacher = slice(0, batch), slice(batch, 2 * batch)

    def term(embeddings: Tensor, sources: tuple[slice, ...], weight: float) -> Term:
        weights = embeddings.new_full((batch,), weight / (batch * pairs))
        return Term(embeddings.unflatten(0, (-1, batch)), targets, sources, weights, student_temp)

    of_globals, of_locals = [], []
    if global_weight > 0 and len(global_embeddings):
        for view, embeddings in zip(views, global_embeddings.split(batch), strict=True):
            of_globals.append(term(embeddings, (of_teacher[1 - view],), global_weight))
    if local_weight > 0 and len(local_embeddings):
        of_locals.append(term(local_embeddings, of_teacher, local_weight))
    return of_globals, of_locals
