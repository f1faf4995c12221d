"""The entropy-bounded sampler (EB, arXiv:2505.24857): commit together what is nearly certain."""

import torch.nn.functional as F
from torch import Tensor

from ..strategies import COMMITS, Guess, Method, Now, surest
from .scores import negative_entropy


class EntropyBound(Method):
    """Commit the most holes whose entropies, without the largest of them, add up to at most gamma nats.
    Entropies [.05,.5,.02] and gamma .1, in rising order .02, .05, .5: before each stand 0, .02 and .07 -> all three."""

    score = staticmethod(negative_entropy)

    def __init__(self, gamma: float = 0.1) -> None:
        self.gamma = gamma

    def commit(self, now: Now, guess: Guess) -> Tensor:
        entropy = -guess.score.sort(dim=1, descending=True).values  # rising; inf where nothing was asked
        others = F.pad(entropy, (1, 0)).cumsum(1)[:, :-1]  # what the smaller ones add up to
        return surest(guess.score, (others <= self.gamma).sum(1))


COMMITS["entropy-bound"] = EntropyBound
