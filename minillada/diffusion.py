"""Masked diffusion: how text is noised, and the bound on its likelihood that predicting the noise away gives.

Forward process (LLaDA, arXiv:2502.09992, eq. 7): every token of x0 becomes [MASK] with probability p_mask(t), apart
from the others; t in (0,1] is the masking level. The bound (eq. 12), in nats, with CE_i = -log p(x0_i | xt):

    -log p(x0)  <=  E_t E_xt [ weight(t) * sum of CE_i over the masked i ]

Drawing the number of masked tokens first (eq. 14) gives the same number with less variance per sample. Estimates of
likelihoods made of it are in `likelihood.py`.

Shapes: B batch, T sequence, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


class Noised(NamedTuple):
    """A noised batch: the tokens, which of them were masked, and what a masked token's cross-entropy counts."""

    xt: Tensor  # (B,T) long
    masked: Tensor  # (B,T) bool
    weight: Tensor  # (B,) float32, so that weight * sum of CE is an unbiased estimate of the bound

    def to(self, device: torch.device | str) -> "Noised":
        return Noised(*(x.to(device) for x in self))


def sample_t(n: int, rng: Generator, stratified: bool = True) -> Tensor:
    """n masking levels (n,) in (0,1]: independent, or one from each of n equal slices (MDLM's "antithetic")."""
    u = torch.rand(n, generator=rng)
    return 1 - ((torch.arange(n) + u) / n if stratified else u)


# t -> (p_mask = 1 - alpha, weight = -alpha' / (1 - alpha)). All schedules have the same bound, with another variance.
Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]


def linear(t: Tensor) -> tuple[Tensor, Tensor]:
    """LLaDA's schedule, alpha = 1 - t: (p_mask, weight) = (t, 1/t)."""
    return t, 1 / t


def cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    """MD4's, alpha = 1 - cos(pi/2 (1-t)): fewer nearly empty inputs (arXiv:2406.04329, table 1)."""
    angle = math.pi / 2 * (1 - t)
    return angle.cos(), math.pi / 2 * angle.tan()


def bernoulli(
    x0: Tensor, mask_id: int, t: Tensor, rng: Generator, maskable: Tensor | None = None, schedule: Schedule = linear
) -> Noised:
    """Each maskable token of x0 (B,T) is masked with probability p_mask(t), t (B,): LLaDA's guidelines.

    The level is kept above 1/1000, where the weight explodes: it changes the bound by less than 0.1 %.
    """
    p_mask, weight = schedule(t.clamp(min=1e-3))
    masked = torch.rand(x0.shape, generator=rng) < p_mask[:, None]
    masked = masked if maskable is None else masked & maskable
    return Noised(x0.masked_fill(masked, mask_id), masked, weight)


def bernoulli_mean(x0: Tensor, mask_id: int, t: Tensor, rng: Generator, maskable: Tensor | None = None) -> Noised:
    """`bernoulli` with 1/t replaced by its mean over all t that could have masked as many: (L+1)/m for m of L.

    Averaged over rows, CE's mean over a row's own masked tokens is this, up to rows with m = 0.
    """
    noised = bernoulli(x0, mask_id, t, rng, maskable)
    length = lengths(x0, maskable)
    return noised._replace(weight=(length + 1) / noised.masked.sum(1).clamp(min=1))


def exact_count(x0: Tensor, mask_id: int, t: Tensor, rng: Generator, maskable: Tensor | None = None) -> Noised:
    """Exactly l = ceil(t L) of a row's L maskable tokens are masked, at random; weight L/l (eq. 14)."""
    length = lengths(x0, maskable)
    count = (t.double() * length).ceil().long().clamp(min=1).minimum(length)
    order = torch.rand(x0.shape, generator=rng)
    order = order if maskable is None else order.masked_fill(~maskable, 2.0)
    masked = order.argsort(1).argsort(1) < count[:, None]
    return Noised(x0.masked_fill(masked, mask_id), masked, length / count.clamp(min=1))


def lengths(x0: Tensor, maskable: Tensor | None) -> Tensor:
    """How many tokens of each row may be masked, (B,)."""
    return torch.full((len(x0),), x0.shape[1]) if maskable is None else maskable.sum(1)


PROCESSES: dict[str, Callable[..., Noised]] = {
    "exact-count": exact_count,
    "bernoulli-mean": bernoulli_mean,
    "bernoulli": bernoulli,
    "bernoulli-cosine": partial(bernoulli, schedule=cosine),
}


def nll_bound(logits: Tensor, x0: Tensor, noised: Noised) -> Tensor:
    """One-sample estimate (B,) of the upper bound on -log p(x0), in nats per row.

    logits: (B,T,V), or (N,V) for the N masked positions alone in reading order (`model(xt, where=...)`).
    """
    row, column = noised.masked.nonzero(as_tuple=True)
    logits = logits[row, column] if logits.dim() == 3 else logits
    nats = F.cross_entropy(logits.float(), x0[row, column], reduction="none")  # float32 whatever the model computes in
    return torch.zeros(len(x0), device=x0.device).index_add(0, row, nats * noised.weight[row])


def model_bound(model: nn.Module, x0: Tensor, noised: Noised, attn_mask: Tensor | None = None) -> Tensor:
    """`nll_bound` of a model, which computes logits for the masked positions only."""
    where = noised.masked.nonzero(as_tuple=True)
    return nll_bound(model(noised.xt, attn_mask=attn_mask, where=where), x0, noised)


def pretraining_loss(model: nn.Module, x0: Tensor, noised: Noised) -> Tensor:
    """The bound in nats per token, averaged over rows: what `train` minimises (LLaDA, eq. 3)."""
    return model_bound(model, x0, noised).mean() / x0.shape[1]


def random_length(x0: Tensor, rng: Generator, share: float = 0.01) -> Tensor:
    """Cut 1 % of the batches to a random length, so that short inputs are familiar too (LLaDA, section 2.2)."""
    cut, length = torch.rand(2, generator=rng).tolist()
    return x0[:, : 1 + int(length * x0.shape[1])] if cut < share else x0
