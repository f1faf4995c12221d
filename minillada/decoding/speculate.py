"""Self-speculation (the idea of SSD and S2D2): a block model drafts several tokens at once, and the same weights, asked
one token after the other, verify them. Shapes: R rows, T sequence, W tokens of a block.

At temperature 0 the text is exactly that of blocks of one token, in fewer evaluations where the two agree.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..strategies import BLOCK_RULES, Ask, Guess, Method, Now, probability


class Speculate(Method):
    """Draft every hole of the block in one evaluation, then verify all of them in another one: commit the draft as far
    as it is what blocks of one token would write, and their token at the first place where it is not."""

    score = staticmethod(probability)
    steps = 2**20  # every second one commits a token at least

    def __init__(self) -> None:
        self.draft: Tensor | None = None  # (R,W) to be verified next

    def wrap(self, predict: Callable[[Ask], Tensor]) -> Callable[[Ask], Tensor]:
        mask_id = predict.config.mask_id

        def asked(ask: Ask) -> Tensor:
            return predict(ask if self.draft is None else one_by_one(ask, self.draft, mask_id))

        return asked

    def commit(self, now: Now, guess: Guess) -> Tensor:
        if self.draft is None:
            self.draft = guess.tokens
            return torch.zeros_like(now.hole)
        same = (guess.tokens == self.draft) | ~now.hole
        self.draft = None
        return now.hole & F.pad(same.long().cumprod(1), (1, 0), value=1)[:, :-1].bool()  # all before it were right


def one_by_one(ask: Ask, draft: Tensor, mask_id: int) -> Ask:
    """Return the question what blocks of one token say at each hole of the window, given the draft (R,W) before it.
    Behind the text stands a mask for each column of the window, which has its position and sees what is before it."""
    length, window, device = ask.x.shape[1], ask.window, ask.x.device
    column = torch.arange(window.start, window.stop, device=device)  # (W,)
    x, n = ask.x.clone(), len(column)
    x[:, window] = torch.where(x[:, window] == mask_id, draft, x[:, window])
    position = torch.cat([torch.arange(length, device=device), column])  # (T+W,)
    text = torch.arange(length + n, device=device) < length
    look = text & (position < position[:, None]) | torch.eye(length + n, device=device).bool()
    if ask.attn_mask is not None:
        look = look & F.pad(ask.attn_mask, (0, n), value=True)
    row, where = ask.where
    return ask._replace(
        x=torch.cat([x, x.new_full((len(x), n), mask_id)], dim=1),
        where=(row, length + where - window.start),
        window=slice(window.start, length + n),
        attn_mask=look.expand(len(x), 1, -1, -1),
        positions=position,
    )


BLOCK_RULES["speculate"] = Speculate
