"""dLLM-Cache (arXiv:2506.06295): compute again only the places that have probably changed.

This is an approximation: one new token changes what every position computes, and what is reused here is out of date
until it is renewed. With prompt_every=1 and answer_every=1, or share=1, the logits are the model's own.
Shapes: B rows of the canvas (rows B and above are those that guidance adds), R of them in a question, T sequence, A
columns that may be renewed in a call, M the most places renewed in a row, N places renewed in all rows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput, check_number, check_whole
from ..model import attend, rotary_angles
from ..strategies import CACHES, Ask, Whole
from .fast_dllm import of_module


class Refresh:
    """Remember each position's key, value and output in every layer, and renew a part of them per call.

    A row's prompt is computed again every prompt_every calls, its answer every answer_every calls. In between, the
    first layer, where a value shows nothing of what changed around it, renews the whole answer. Each layer above renews
    this share of it, rounded up: the places whose new value vector is least like the one held (by cosine). All layers
    renew the place of a token changed since the last call, first and even beyond the share; with share=0 nothing else.
    """

    def __init__(
        self, predict: Whole, given: Tensor, prompt_every: int = 50, answer_every: int = 7, share: float = 0.25
    ) -> None:
        self.model, self.config, self.device = predict.model, predict.config, predict.device
        self.given, self.share = given, share  # given (B,T): the prompt's places
        self.prompt_every, self.answer_every = prompt_every, answer_every
        self.calls: Tensor | None = None  # (B or 2B,) how often each row was asked about

    @torch.no_grad()
    def __call__(self, ask: Ask) -> Tensor:
        """Return the logits. Raises BadInput unless the question is about whole rows of the canvas."""
        if ask.x.shape[1] != self.given.shape[1]:
            what = f"refresh: expected whole rows of {self.given.shape[1]} tokens, got {ask.x.shape[1]}"
            raise BadInput(f"{what}; make a new Refresh for another canvas")
        if self.calls is None:
            self.allocate(len(self.given) * (2 if (ask.rows >= len(self.given)).any() else 1))  # 2: guided
        rows, given = ask.rows, self.given[ask.rows % len(self.given)]  # (R,), (R,T)
        every = torch.where(given, self.prompt_every, self.answer_every)
        due = (self.calls[rows, None] % every == 0) | (ask.x != self.tokens[rows])  # (R,T)
        self.tokens[rows], self.calls[rows] = ask.x, self.calls[rows] + 1
        self.renew(ask, given, due)
        row, column = ask.where
        return self.model.head(self.model.norm(self.out[rows[row], column]))

    def allocate(self, n_row: int) -> None:
        c, embed, shape = self.config, self.model.embed.weight, (n_row, self.given.shape[1])
        self.k, self.v = embed.new_zeros(2, c.n_layer, *shape, c.n_kv_head * c.d_head)  # k after the rotation
        self.change = embed.new_zeros(c.n_layer, *shape, c.d_model)  # what a layer adds to the residual stream
        self.out = embed.new_zeros(*shape, c.d_model)  # the residual stream after the last layer
        self.tokens = torch.full(shape, -1, device=embed.device)  # none yet, so every place counts as changed
        self.calls = torch.zeros(n_row, dtype=torch.long, device=embed.device)

    def plan(self, due: Tensor, given: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
        """Count what a layer renews: the due places (R,A), and of the answer at least the share. Return due, M, and for
        each of the N places its row and its rank in the row (rows may have unequal counts)."""
        least = (self.share * (~given).sum(1)).ceil().long()
        count = (due & given).sum(1) + (due & ~given).sum(1).maximum(least)  # (R,)
        most = int(count.max())
        row, rank = (torch.arange(most, device=due.device) < count[:, None]).nonzero(as_tuple=True)
        return due, most, row, rank

    def renew(self, ask: Ask, given: Tensor, due: Tensor) -> None:
        """Renew the due places in every layer, and the answer's least alike: all of them in the first layer."""
        first = due | ~given if self.share else due
        asked = first.any(0).nonzero().flatten()  # (A,)
        if not len(asked):
            return
        rows = slice(None) if len(ask.rows) == len(self.calls) else ask.rows  # a slice copies nothing
        given, mine = given[:, asked], (ask.rows[:, None], asked)
        here = torch.arange(len(given), device=asked.device)[:, None]
        plans = [self.plan(first[:, asked], given)] + [self.plan(due[:, asked], given)] * (self.config.n_layer - 1)
        x = self.model.embed(ask.x[:, asked])  # (R,A,C)
        positions = asked if ask.positions is None else ask.positions[asked]
        cos, sin = rotary_angles(positions, self.config, x.dtype)  # (1,A,rotary_dim/2) each
        layers = zip(self.model.layers, self.k, self.v, self.change, plans, strict=True)
        for layer, held_k, held_v, change, (due, most, row, rank) in layers:
            attn, normed = layer.attn, layer.attn_norm(x)
            v = attn.v(normed)  # (R,A,Hkv*D)
            alike = F.cosine_similarity(v.to(cos.dtype), held_v[mine].to(cos.dtype), dim=-1).float()  # (R,A)
            order = alike.masked_fill(given, 2).masked_fill(due, -2).argsort(dim=1, stable=True)[:, :most]  # (R,M)
            h, rotary = normed[here, order], (cos[0][order][:, None], sin[0][order][:, None])
            place = order[row, rank]  # of the N places, the number among the A columns
            there = ask.rows[row], asked[place]  # and where they are on the canvas
            held_k[there] = attn.keys(h, rotary).transpose(1, 2).flatten(2)[row, rank]
            held_v[there] = v[row, place]
            k, values = attn.heads(held_k[rows]), attn.heads(held_v[rows])  # (R,Hkv,T,D)
            y = attend(attn.queries(h, rotary), k, values, ask.attn_mask)  # (R,H,M,D)
            y = attn.o(y.transpose(1, 2).flatten(2)[row, rank])  # (N,C)
            change[there] = y + layer.ffn(layer.ffn_norm(x[row, place] + y))
            x = x + change[mine]
        self.out[mine] = x


def refresh(prompt_every: int = 50, answer_every: int = 7, share: float = 0.25) -> Callable[[Whole, Tensor], Refresh]:
    """Return what wraps a predictor. Raises BadInput for parameters out of range."""
    check_whole("cache refresh, prompt_every", prompt_every, 1)
    check_whole("cache refresh, answer_every", answer_every, 1)
    check_number("cache refresh, share", share, 0.0, 1.0)
    return lambda predict, given: Refresh(of_module("refresh", predict), given, prompt_every, answer_every, share)


CACHES["refresh"] = refresh
