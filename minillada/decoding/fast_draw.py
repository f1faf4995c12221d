"""Draw a token in two rounds, with 2 sqrt(V) random numbers a hole in place of V: first a group of about sqrt(V) ids by
the logarithm of its mass, then an id of that group. Shapes: N holes, V vocabulary, G groups."""

import math

import torch
from torch import Generator, Tensor

from ..strategies import QUICKER, gumbel_argmax


def grouped(logits: Tensor, temperature: float, rng: Generator) -> Tensor:
    """Do the same as `gumbel_argmax`: draw an index (N,) from softmax(logits (N,V) / temperature)."""
    size = logits.shape[-1]
    width = next(width for width in range(math.isqrt(size), 0, -1) if size % width == 0)
    groups = logits.unflatten(-1, (-1, width))  # (N,G,width)
    mass = groups.amax(-1)  # (N,G)
    if temperature:
        below = groups - mass.clamp(min=torch.finfo(mass.dtype).min)[..., None]  # a group may be all -inf
        mass = mass.double() + temperature * below.div_(temperature).exp_().sum(-1).double().log()
    group = gumbel_argmax(mass, temperature, rng)
    inside = groups[torch.arange(len(group), device=group.device), group]  # (N,width)
    return group * width + gumbel_argmax(inside, temperature, rng)


QUICKER[gumbel_argmax] = grouped
