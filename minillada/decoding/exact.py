"""Draw from the model's own distribution, with remasking "random", temperature 1 and one window. Ancestral (LLaDA,
eq. 10) is exact as the steps grow; first-hitting (arXiv:2409.02908), its limit, with a step a token."""

import torch
from torch import Tensor

from ..strategies import COMMITS, Now, Quota


class Ancestral(Quota):
    """Commit each hole with probability 1 - s/t = 1/left, independently."""

    def due(self, now: Now) -> Tensor:
        return ((now.uniform() < 1 / now.left) & now.hole).sum(1)


class FirstHitting(Quota):
    """Commit one hole a step."""

    def due(self, now: Now) -> Tensor:
        return torch.ones_like(now.holes())


COMMITS |= {"ancestral": Ancestral, "first-hitting": FirstHitting}
