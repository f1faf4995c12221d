"""KLASS (arXiv:2511.05664): commit together what the model is sure of and has been predicting for a while."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..strategies import COMMITS, Ask, Guess, Now, Quota, probability, surest


class Klass(Quota):
    """Commit the holes that are both sure and steady; where a row has none, the quota's worth of the surest.
    Sure: a probability above tau. Steady: KL(prediction now || prediction before) below delta in the last two steps.
    The paper takes tau 0.6 to 0.9 and delta 0.01 to 0.015, and as many steps as there are tokens."""

    score = staticmethod(probability)

    def __init__(self, tau: float = 0.9, delta: float = 0.01) -> None:
        self.tau, self.delta = tau, delta
        self.place: Tensor | None = None  # (N,) which holes the last evaluation was about, rising
        self.log_p, self.steady = None, None  # (N,V) what it predicted, (N,) for how many steps each has been steady

    def wrap(self, predict: Callable[[Ask], Tensor]) -> Callable[[Ask], Tensor]:
        def watched(ask: Ask) -> Tensor:
            logits, (row, column) = predict(ask), ask.where
            log_p = logits.float().log_softmax(-1).clamp(min=-1e9)  # 0 * -inf counts as 0
            place = row * ask.x.shape[1] + column
            steady = torch.zeros_like(place)
            if self.place is not None:
                old = torch.searchsorted(self.place, place)  # a hole now was a hole before
                divergence = (log_p.exp() * (log_p - self.log_p[old])).sum(-1)  # nats
                steady = torch.where(divergence < self.delta, self.steady[old] + 1, 0)
            self.place, self.log_p, self.steady = place, log_p, steady
            return logits

        return watched

    def ask(self, now: Now) -> Tensor:
        return now.hole

    def commit(self, now: Now, guess: Guess) -> Tensor:
        steady = torch.zeros_like(now.x).masked_scatter(now.hole, self.steady)  # (R,W)
        ready = (guess.score > self.tau) & (steady >= 2)
        return torch.where(ready.any(1, keepdim=True), ready, surest(guess.score, self.due(now)))


COMMITS["klass"] = Klass
