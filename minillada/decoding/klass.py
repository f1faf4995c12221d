"""KLASS: commit together what the model is sure of and has been saying for a while (arXiv:2511.05664).

It needs to remember what was predicted before, so it watches the model from outside. Shapes: N holes asked about,
T sequence, R rows, W window, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ..strategies import Method, Now, probability, quota

CALM = 2  # so many steps in a row


class Klass:
    """Sure: a probability above tau. Steady: the last two changes of the prediction, as KL(now || before), below delta.

    What is both is committed at once; where nothing is, the quota's worth of the surest.
    """

    def __init__(self, tau: float, delta: float) -> None:
        self.tau, self.delta = tau, delta
        self.place: Tensor | None = None  # (N,) which holes the last evaluation was about, rising
        self.log_p: Tensor | None = None  # (N,V) what it said
        self.calm: Tensor | None = None  # (N,) for how many steps each has been steady

    def watch(self, denoise: Callable[..., Tensor], window: slice, mask_id: int) -> Callable[..., Tensor]:
        def watched(x: Tensor, attn_mask: Tensor | None, positions: Tensor, where: tuple, cache=None) -> Tensor:
            logits = denoise(x, attn_mask, positions, where, cache)
            row, column = where[0], positions[where[1]]
            self.remember(row * 2**32 + column, logits.float().log_softmax(-1).clamp(min=-1e9))  # 0 * -inf counts as 0
            return logits

        return watched

    def remember(self, place: Tensor, log_p: Tensor) -> None:
        calm = torch.zeros_like(place)
        if self.place is not None:
            old = torch.searchsorted(self.place, place)  # a hole now was a hole before
            divergence = (log_p.exp() * (log_p - self.log_p[old])).sum(-1)  # nats
            calm = torch.where(divergence < self.delta, self.calm[old] + 1, 0)
        self.place, self.log_p, self.calm = place, log_p, calm

    def score(self, logits: Tensor, tokens: Tensor, rng: Generator) -> Tensor:
        """The token's probability, and one more where it is sure and steady: those come first."""
        p = probability(logits, tokens, rng)
        return p + ((p > self.tau) & (self.calm >= CALM))

    def commit(self, confidence: Tensor, now: Now) -> Tensor:
        ready = (confidence > 1).sum(1)
        return torch.where(ready > 0, ready, quota().commit(confidence, now))


def klass(tau: float = 0.9, delta: float = 0.01) -> Method:
    """The paper takes tau 0.6 to 0.9 and delta 0.01 to 0.015, and needs steps to spare: as many as there are tokens."""
    rule = Klass(tau, delta)
    return Method(rule.commit, watch=rule.watch, score=rule.score)
