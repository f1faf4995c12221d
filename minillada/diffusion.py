"""Masked diffusion: how text is noised, and the bound on its likelihood that predicting the noise away gives.

Forward process (LLaDA, arXiv:2502.09992, eq. 7): every token of x0 becomes [MASK] with probability t, independently of
the others; t in (0,1] is the masking level. The bound (eq. 12), in nats, with CE_i = -log p(x0_i | xt):

    -log p(x0)  <=  E_t E_xt [ 1/t * sum of CE_i over the masked i ]

Drawing the number of masked tokens first (eq. 14) gives the same number with less variance per sample.

Shapes: B batch, T sequence, N masked tokens of the batch, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


class Noised(NamedTuple):
    """Hold a noised batch: the tokens, which of them were masked, and what a masked token's cross-entropy counts."""

    xt: Tensor  # (B,T) long
    masked: Tensor  # (B,T) bool
    weight: Tensor  # (B,) or, of each token, (B,T): weight * CE, summed, is an unbiased estimate of the bound

    def to(self, device: torch.device | str) -> "Noised":
        return Noised(*(x.to(device) for x in self))


def sample_t(n: int, rng: Generator, stratified: bool = True) -> Tensor:
    """Draw n masking levels (n,) in (0,1]: independent, or one from each of n equal slices (MDLM's "antithetic")."""
    u = torch.rand(n, generator=rng)
    return 1 - ((torch.arange(n) + u) / n if stratified else u)


def bernoulli(x0: Tensor, mask_id: int, t: Tensor, rng: Generator, maskable: Tensor | None = None) -> Noised:
    """Mask each maskable token of x0 (B,T) with probability t (B,); weight 1/t, as in LLaDA's guidelines.

    t is kept above 1/1000, below which the weight explodes; that changes the bound by less than 0.1 %.
    """
    t = t.clamp(min=1e-3)
    masked = torch.rand(x0.shape, generator=rng) < t[:, None]
    masked = masked if maskable is None else masked & maskable
    return Noised(x0.masked_fill(masked, mask_id), masked, 1 / t)


def exact_count(x0: Tensor, mask_id: int, t: Tensor, rng: Generator, maskable: Tensor | None = None) -> Noised:
    """Mask exactly l = ceil(t L) of a row's L maskable tokens, chosen at random; weight L/l (eq. 14).

    L = 8 and t = 0.3 -> 3 masks, weight 8/3.
    """
    length = lengths(x0, maskable)
    count = (t.double() * length).ceil().long().clamp(min=1).minimum(length)
    order = torch.rand(x0.shape, generator=rng)
    order = order if maskable is None else order.masked_fill(~maskable, 2.0)
    masked = order.argsort(1).argsort(1) < count[:, None]  # the ranks below l
    return Noised(x0.masked_fill(masked, mask_id), masked, length / count.clamp(min=1))


def lengths(x0: Tensor, maskable: Tensor | None) -> Tensor:
    """Count the maskable tokens of each row, (B,)."""
    return torch.full((len(x0),), x0.shape[1]) if maskable is None else maskable.sum(1)


PROCESSES: dict[str, Callable[..., Noised]] = {"exact-count": exact_count, "bernoulli": bernoulli}  # training/ adds two


def nll_bound(logits: Tensor, x0: Tensor, noised: Noised) -> Tensor:
    """Estimate the upper bound of -log p(x0) for each row, (B,) in nats, from one noised sample.

    logits: (B,T,V), or (N,V) for the masked tokens alone in reading order (`model(xt, where=...)`).
    """
    row, column = noised.masked.nonzero(as_tuple=True)
    logits = logits[row, column] if logits.dim() == 3 else logits
    wide = torch.promote_types(logits.dtype, torch.float32)  # whatever the model computes in
    weight = (noised.weight if noised.weight.dim() == 2 else noised.weight[:, None]).expand_as(x0)
    nats = F.cross_entropy(logits.to(wide), x0[row, column], reduction="none") * weight[row, column]
    return torch.zeros(len(x0), dtype=nats.dtype, device=x0.device).index_add(0, row, nats)


def model_bound(model: nn.Module, x0: Tensor, noised: Noised, attn_mask: Tensor | None = None) -> Tensor:
    """Return `nll_bound` of a model, which computes logits for the masked tokens only."""
    where = noised.masked.nonzero(as_tuple=True)
    return nll_bound(model(noised.xt, attn_mask=attn_mask, where=where), x0, noised)


def pretraining_loss(model: nn.Module, x0: Tensor, noised: Noised) -> Tensor:
    """Return the bound in nats per token, averaged over rows: what training minimises (LLaDA, eq. 3)."""
    return model_bound(model, x0, noised).mean() / x0.shape[1]


def random_length(x0: Tensor, rng: Generator, share: float = 0.01) -> Tensor:
    """Cut 1 % of the batches to a random length, so that short inputs are familiar too (LLaDA, section 2.2)."""
    cut, length = torch.rand(2, generator=rng).tolist()
    return x0[:, : 1 + int(length * x0.shape[1])] if cut < share else x0
