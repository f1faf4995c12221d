"""MD4's cosine schedule (arXiv:2406.04329, table 1): fewer nearly empty inputs than with the linear one, t itself.
A schedule says which p_mask belongs to a level t. The bound is the same for all, its variance is not: a masked token's
cross-entropy then counts p_mask'(t) / p_mask(t), which is 1/t for p_mask = t."""

import math

from torch import Generator, Tensor

from ..diffusion import PROCESSES, Noised, bernoulli


def cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return p_mask = cos(pi/2 (1-t)) and the weight of a masked token at levels t."""
    angle = math.pi / 2 * (1 - t)
    return angle.cos(), math.pi / 2 * angle.tan()


def bernoulli_cosine(x0: Tensor, mask_id: int, t: Tensor, rng: Generator, maskable: Tensor | None = None) -> Noised:
    """Mask each maskable token of x0 (B,T) with the cosine schedule's probability at levels t (B,)."""
    p_mask, weight = cosine(t.clamp(min=1e-3))
    return bernoulli(x0, mask_id, p_mask, rng, maskable)._replace(weight=weight)


PROCESSES["bernoulli-cosine"] = bernoulli_cosine
