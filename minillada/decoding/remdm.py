"""ReMDM (arXiv:2503.00307): an ancestral sampler that also masks tokens again, and keeps P(masked at s) = s.

Time falls evenly: t = left/steps before a step, s = (left - 1)/steps after it. A committed token becomes a hole again
with probability sigma <= sigma_max; a hole is filled with probability (t - s + sigma * (1 - t)) / t, so that the share
of holes is that of an ancestral sampler. With sigma = 0 it is one. Shapes: R rows, W window.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..strategies import REVISIONS, Now, Quota


def times(now: Now) -> tuple[float, float, float]:
    """Return t, s and sigma_max."""
    t, s = now.left / now.steps, (now.left - 1) / now.steps
    return t, s, min(1.0, s / (1 - t)) if t < 1 else 1.0


class Even(Quota):
    """Take the same sigma for every token, which is a function of sigma_max."""

    def __init__(self, sigma: Callable[[float], float]) -> None:
        self.sigma = sigma

    def due(self, now: Now) -> Tensor:
        t, s, most = times(now)
        return ((now.uniform() < (t - s + self.sigma(most) * (1 - t)) / t) & now.hole).sum(1)

    def revise(self, now: Now) -> Tensor:
        return (now.uniform() < self.sigma(times(now)[2])) & ~now.held.isnan()


# The paper's two schedules of sigma that look at no token.
def cap(eta: float = 0.008) -> Even:
    return Even(lambda most: min(eta, most))


def rescale(eta: float = 0.015) -> Even:
    return Even(lambda most: min(eta, 1.0) * most)


class Confidence(Quota):
    """Share sigma_max out among a row's tokens by softmax(-probability at commit): the least sure go back first.
    The paper fills holes as if sigma were 0, and the share of holes then grows beyond s. Here the holes of a row take
    on what its tokens give: that needs sigma_max of at most holes * s/t in all, and a hole at all."""

    def given_back(self, now: Now) -> Tensor:
        """Return how many tokens of each row go back on average, (R,)."""
        t, s, most = times(now)
        return (now.holes() * s / t).clamp(max=most) * ~now.held.isnan().all(1)

    def due(self, now: Now) -> Tensor:
        t, s, _ = times(now)
        chance = (t - s) / t + self.given_back(now) / now.holes().clamp(min=1)
        return ((now.uniform() < chance[:, None]) & now.hole).sum(1)

    def revise(self, now: Now) -> Tensor:
        share = (-now.held).masked_fill(now.held.isnan(), -torch.inf).softmax(1).nan_to_num(0)  # a row may have none
        return now.uniform() < share * self.given_back(now)[:, None]


REVISIONS |= {"remdm-cap": cap, "remdm-rescale": rescale, "remdm-conf": Confidence}
