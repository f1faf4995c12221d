"""Ways to decode that take committed tokens back: ReMDM, re-checking as in WINO, and random remasking.

Each is a `Method` with a commit rule of its own. Shapes: R rows, W window, T sequence, N holes asked about.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..strategies import Method, Now

# ---- ReMDM (arXiv:2503.00307): an ancestral sampler that also masks again, and keeps P(masked at s) = s --------------
# Time falls evenly: t = left/steps before the step, s = (left - 1)/steps after it. A committed token goes back with
# probability sigma <= sigma_max; a hole is filled with probability (t - s + sigma * (1 - t)) / t, so that the share of
# holes is that of an ancestral sampler. With sigma = 0 it is one.


def times(now: Now) -> tuple[float, float, float]:
    """t, s and sigma_max."""
    t, s = now.left / now.steps, (now.left - 1) / now.steps
    return t, s, min(1.0, s / (1 - t)) if t < 1 else 1.0


def remdm(sigma: Callable[[float], float]) -> Method:
    """sigma: of sigma_max, the same for every token."""

    def commit(_: Tensor, now: Now) -> Tensor:
        t, s, most = times(now)
        return ((now.uniform() < (t - s + sigma(most) * (1 - t)) / t) & now.hole).sum(1)

    def revise(now: Now) -> Tensor:
        return (now.uniform() < sigma(times(now)[2])) & ~now.held.isnan()

    return Method(commit, blind=True, revise=revise)


def remdm_cap(eta: float = 0.008) -> Method:
    """sigma = min(eta, sigma_max)."""
    return remdm(lambda most: min(eta, most))


def remdm_rescale(eta: float = 0.015) -> Method:
    """sigma = eta * sigma_max."""
    return remdm(lambda most: min(eta, 1.0) * most)


def remdm_conf() -> Method:
    """sigma_max shared out among a row's tokens by softmax(-confidence at commit): the least sure go back first.

    The paper fills holes as if sigma were 0, and the share of holes then grows beyond s. Here the holes of a row take
    on what its tokens give: that needs sigma_max of at most holes * s/t in all, and a hole at all.
    """

    def given_back(now: Now) -> Tensor:
        t, s, most = times(now)
        return (now.holes() * s / t).clamp(max=most) * ~now.held.isnan().all(1)  # (R,) tokens, on average

    def commit(_: Tensor, now: Now) -> Tensor:
        t, s, _ = times(now)
        chance = (t - s) / t + given_back(now) / now.holes().clamp(min=1)
        return ((now.uniform() < chance[:, None]) & now.hole).sum(1)

    def revise(now: Now) -> Tensor:
        share = (-now.held).masked_fill(now.held.isnan(), -torch.inf).softmax(1).nan_to_num(0)  # a row may have none
        return now.uniform() < share * given_back(now)[:, None]

    return Method(commit, blind=True, revise=revise)


# ---- random remasking, as popular write-ups describe it --------------------------------------------------------------


def random_remask() -> Method:
    """In step i of n: commit what is surer than 0.9 (1 - i/n) + 0.1, and always the surest; and put every token that
    was committed in an earlier step back with probability 0.1 (1 - i/n). Keeps no distribution, corrects by chance."""

    def commit(confidence: Tensor, now: Now) -> Tensor:
        return (confidence > 0.9 * now.left / now.steps + 0.1).sum(1).clamp(min=1)

    def revise(now: Now) -> Tensor:
        return (now.uniform() < 0.1 * now.left / now.steps) & ~now.held.isnan()

    return Method(commit, revise=revise)


# ---- WINO (arXiv:2507.18578): commit boldly, look again, take back what no longer convinces --------------------------


class Wino:
    """Every committed token gets a shadow: a mask at its position that sees all but that token, and says how probable
    the token is given the others. Nothing sees the shadows. Below `keep` the token goes back."""

    def __init__(self, accept: float, keep: float) -> None:
        self.accept, self.keep = accept, keep
        self.accepted: Tensor | None = None  # (R,) how many were committed in the step before
        self.belief: Tensor | None = None  # (R,W) the shadows' probability of the tokens; NaN without a shadow

    def watch(self, denoise: Callable[..., Tensor], window: slice, mask_id: int) -> Callable[..., Tensor]:
        def watched(x: Tensor, attn_mask: Tensor | None, positions: Tensor, where: tuple, cache=None) -> Tensor:
            (n_row, length), device = x.shape, x.device
            written = x[:, window] != mask_id  # (R,W)
            column = written.any(0).nonzero().flatten() + window.start  # (S,) where shadows are wanted
            look = torch.ones(length + len(column), length + len(column), dtype=torch.bool, device=device)
            look[:, length:] = False
            shadow = torch.arange(length, length + len(column), device=device)
            look[shadow, shadow], look[shadow, column] = True, False
            seen = attn_mask if attn_mask is not None else look.new_ones(n_row, 1, 1, length)
            look = look & F.pad(seen, (0, len(column)), value=True)  # (R,1,T+S,T+S)
            x = torch.cat([x, x.new_full((n_row, len(column)), mask_id)], dim=1)
            positions = torch.cat([positions, positions[column]])
            row, which = written[:, column - window.start].nonzero(as_tuple=True)
            both = torch.cat([where[0], row]), torch.cat([where[1], length + which])
            logits = denoise(x, look, positions, both, cache)
            tokens = x[row, column[which]]
            p = logits[len(where[0]) :].float().softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
            self.belief = torch.full(written.shape, torch.nan, device=device)
            self.belief[row, column[which] - window.start] = p
            return logits[: len(where[0])]

        return watched

    def revise(self, now: Now) -> Tensor:
        """The least believed first, and fewer than were committed in the step before, so that the work ends."""
        if self.accepted is None or self.belief is None:
            return torch.zeros_like(now.hole)
        belief = torch.where((self.belief < self.keep) & ~now.held.isnan(), self.belief, torch.inf)
        rank = belief.argsort(1).argsort(1)
        self.belief = None  # looked at once
        return (rank < self.accepted[:, None] - 1) & (belief < torch.inf)

    def commit(self, confidence: Tensor, now: Now) -> Tensor:
        """All above `accept`: at least the surest, at most 70 % of the holes (or 5) and never over 20."""
        most = (0.7 * now.holes()).long().clamp(5, 20)
        self.accepted = (confidence > self.accept).sum(1).clamp(min=1).minimum(most).minimum(now.holes())
        return self.accepted


def wino(accept: float = 0.6, keep: float = 0.9) -> Method:
    rule = Wino(accept, keep)
    return Method(rule.commit, revise=rule.revise, watch=rule.watch)


REVISIONS: dict[str, Callable[..., Method]] = {
    "remdm-cap": remdm_cap,
    "remdm-rescale": remdm_rescale,
    "remdm-conf": remdm_conf,
    "random-remask": random_remask,
    "wino": wino,
}
