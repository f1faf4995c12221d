"""Two more scores for the order in which holes are filled, from logits (N,V): the margin and the entropy."""

import torch
from torch import Generator, Tensor

from ..strategies import SCORES


def margin(logits: Tensor, tokens: Tensor, rng: Generator) -> Tensor:
    """Score by how far the likeliest token leads the second (arXiv:2502.06768, section 4)."""
    best = logits.softmax(-1).topk(2).values
    return best[:, 0] - best[:, 1]


def negative_entropy(logits: Tensor, tokens: Tensor, rng: Generator) -> Tensor:
    """Score by minus the entropy, in nats. Where predictions are nearly uniform, entropies differ by less than float32
    tells apart: hence float64, and a sum in one order, which no other row changes. Equal ones: the leftmost first."""
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    log_p = logits.to(wide).log_softmax(-1)
    return (log_p.exp() * log_p.clamp(min=-1e9)).cumsum(-1)[:, -1]  # 0 * -inf counts as 0


SCORES |= {"margin": margin, "entropy": negative_entropy}
