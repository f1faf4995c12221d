"""WINO (arXiv:2507.18578): commit boldly, check again, and take back what the rest of the text does not support.
Shapes: R rows, T sequence, W window, S shadows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..strategies import REVISIONS, Ask, Guess, Method, Now, probability, surest


class Wino(Method):
    """Give every committed token of the window a shadow: a mask at its position that sees all but that token, and so
    says how probable the token is given the others. Nothing sees the shadows. Below `least` the token goes back."""

    def __init__(self, accept: float = 0.6, least: float = 0.9) -> None:
        self.accept, self.least = accept, least
        self.accepted: Tensor | None = None  # (R,) how many were committed in the step before
        self.belief: Tensor | None = None  # (R,W) the shadows' probability of the tokens; NaN without a shadow

    def wrap(self, predict: Callable[[Ask], Tensor]) -> Callable[[Ask], Tensor]:
        mask_id = predict.config.mask_id

        def watched(ask: Ask) -> Tensor:
            length, window, n = ask.x.shape[1], ask.window, len(ask.where[0])
            written = ask.x[:, window] != mask_id  # (R,W)
            column = written.any(0).nonzero().flatten() + window.start  # (S,) where shadows are wanted
            row, which = written[:, column - window.start].nonzero(as_tuple=True)
            logits = predict(with_shadows(ask, column, (row, length + which), mask_id))
            p = probability(logits[n:].float(), ask.x[row, column[which]])
            self.belief = torch.full(written.shape, torch.nan, device=p.device)
            self.belief[row, column[which] - window.start] = p
            return logits[:n]

        return watched

    def commit(self, now: Now, guess: Guess) -> Tensor:
        """Commit all scores above `accept`: at least the surest, at most 70 % of the holes (or 5), never over 20."""
        most = (0.7 * now.holes()).long().clamp(5, 20)
        self.accepted = (guess.score > self.accept).sum(1).clamp(min=1).minimum(most).minimum(now.holes())
        return surest(guess.score, self.accepted)

    def revise(self, now: Now) -> Tensor | None:
        """Take back the least believed, and fewer than were committed in the step before, so that the work ends."""
        if self.accepted is None or self.belief is None:
            return None
        belief = torch.where((self.belief < self.least) & ~now.held.isnan(), self.belief, torch.inf)
        rank, self.belief = belief.argsort(1).argsort(1), None  # looked at once
        return (rank < self.accepted[:, None] - 1) & (belief < torch.inf)


def with_shadows(ask: Ask, column: Tensor, where: tuple[Tensor, Tensor], mask_id: int) -> Ask:
    """Return the question with a mask behind the text for each of the S columns, and `where` of them asked about too: a
    shadow has its column's position, sees everything but that column, and is seen by itself alone."""
    (n_row, length), n_shadow = ask.x.shape, len(column)
    look = torch.ones(length + n_shadow, length + n_shadow, dtype=torch.bool, device=ask.x.device)
    look[:, length:] = False
    shadow = torch.arange(length, length + n_shadow, device=ask.x.device)
    look[shadow, shadow], look[shadow, column] = True, False
    seen = ask.attn_mask if ask.attn_mask is not None else look.new_ones(n_row, 1, 1, length)
    return ask._replace(
        x=torch.cat([ask.x, ask.x.new_full((n_row, n_shadow), mask_id)], dim=1),
        where=tuple(torch.cat(pair) for pair in zip(ask.where, where, strict=True)),
        window=slice(ask.window.start, length + n_shadow),
        attn_mask=look & F.pad(seen, (0, n_shadow), value=True),  # (R,1,T+S,T+S)
        positions=torch.cat([torch.arange(length, device=ask.x.device), column]),
    )


REVISIONS["wino"] = Wino
