"""Bernoulli noise whose weight is a mean: the bound is the same, one sample of it varies less."""

from torch import Generator, Tensor

from ..diffusion import PROCESSES, Noised, bernoulli, lengths


def bernoulli_mean(x0: Tensor, mask_id: int, t: Tensor, rng: Generator, maskable: Tensor | None = None) -> Noised:
    """Mask as `bernoulli` does, but replace 1/t by its mean over all t that could have masked as many tokens.

    That mean is (L+1)/m for m masked of L maskable tokens: 3 of 8 -> weight 3.
    """
    noised = bernoulli(x0, mask_id, t, rng, maskable)
    return noised._replace(weight=(lengths(x0, maskable) + 1) / noised.masked.sum(1).clamp(min=1))


PROCESSES["bernoulli-mean"] = bernoulli_mean
