"""Compute again only what has probably changed: dLLM-Cache (arXiv:2506.06295) as a wrapper round the model.

An approximation. In a bidirectional model one new token changes what every position computes; what is reused here is
out of date until it is refreshed. With prompt_every=1 and answer_every=1 (or share=1) nothing is reused, and the logits
are the model's own.

Shapes: R rows (B, or 2B under guidance), T sequence, A columns that may be renewed in a call, M the most places renewed
in a row, N places renewed in all rows, C model width, D head width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput, check_number, check_whole
from ..model import LLaDA, attend, rotary_angles, rotate


class Refresh:
    """A model that remembers, to be called like one: with the whole canvas, once per step of one sampling.

    It holds each position's key, value and output in every layer (attention and feed-forward in one sum, as they are
    renewed together). Every prompt_every calls the prompt is computed again, every answer_every calls the answer. In
    between, the first layer renews the whole answer, and each layer above this share of the answer, rounded up: the
    places whose new value vector is least like the one held (by cosine). The first cannot choose: there a value is a
    function of its own token, and shows nothing of what changed around it.

    Where a token has changed since the last call, all layers renew its place, before any other and even beyond the
    share. With share=0 they renew nothing else, the first layer included, and compare nothing.

    given: (B,T) bool, the prompt. Raises BadInput for parameters out of range.
    """

    def __init__(
        self, model: LLaDA, given: Tensor, prompt_every: int = 50, answer_every: int = 7, share: float = 0.25
    ) -> None:
        self.check(prompt_every, answer_every, share)
        self.model, self.given, self.share = model, given, share
        self.prompt_every, self.answer_every, self.calls = prompt_every, answer_every, 0

    @staticmethod
    def check(prompt_every: int, answer_every: int, share: float) -> None:
        """Raise BadInput for parameters out of range."""
        check_whole("cache refresh, prompt_every", prompt_every, 1)
        check_whole("cache refresh, answer_every", answer_every, 1)
        check_number("cache refresh, share", share, 0.0, 1.0)

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        positions: Tensor | None = None,
        where: tuple | None = None,
        cache: None = None,
    ) -> Tensor:
        """The arguments and logits of LLaDA.forward, but x is (R,T), R a multiple of B, the same R at every call;
        attn_mask hides keys only, (R or 1,1,1,T); positions are (T,). Raises BadInput for another canvas or a cache.
        """
        if not self.calls:
            self.allocate(x)
        given = self.given.repeat(len(x) // len(self.given), 1)  # guidance stacks the same rows twice
        if not x.shape == given.shape == self.tokens.shape or cache is not None:
            expected = f"the whole canvas of {tuple(self.given.shape)} at every call, no cache"
            raise BadInput(f"refresh: expected {expected}, got {tuple(x.shape)}, cache {cache}; make a new Refresh")
        due = torch.where(given, self.calls % self.prompt_every == 0, self.calls % self.answer_every == 0)
        due |= x != self.tokens
        self.tokens, self.calls = x.clone(), self.calls + 1

        self.renew(x, attn_mask, positions, given, due)
        out = self.out if where is None else self.out[where]
        return self.model.head(self.model.norm(out))

    def allocate(self, x: Tensor) -> None:
        c, embed = self.model.config, self.model.embed.weight
        self.k, self.v = embed.new_zeros(2, c.n_layer, *x.shape, c.n_kv_head * c.d_head)  # k after the rotation
        self.change = embed.new_zeros(c.n_layer, *x.shape, c.d_model)  # what a layer adds to the residual stream
        self.out = embed.new_zeros(*x.shape, c.d_model)  # the residual stream after the last layer
        self.tokens = x

    def plan(self, due: Tensor, given: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
        """What a layer renews: the due places, (R,A) bool, and of the answer at least the share.

        Returns due, M, and for each of the N places its row and its rank in the row (rows may have unequal counts).
        """
        least = (self.share * (~given).sum(1)).ceil().long()
        count = (due & given).sum(1) + (due & ~given).sum(1).maximum(least)  # (R,)
        most = int(count.max())
        row, rank = (torch.arange(most, device=due.device) < count[:, None]).nonzero(as_tuple=True)
        return due, most, row, rank

    def renew(self, x: Tensor, attn_mask, positions: Tensor | None, given: Tensor, due: Tensor) -> None:
        """Renew the due places in every layer, and the answer's least alike: all of them in the first layer."""
        c = self.model.config
        first = due | ~given if self.share else due
        asked = first.any(0).nonzero().flatten()  # (A,)
        if not len(asked):
            return
        given, rows = given[:, asked], torch.arange(len(x), device=x.device)[:, None]
        plans = [self.plan(first[:, asked], given)] + [self.plan(due[:, asked], given)] * (c.n_layer - 1)
        positions = torch.arange(x.shape[1], device=x.device) if positions is None else positions
        x = self.model.embed(x[:, asked])  # (R,A,C)
        full = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rotary_angles(positions[asked], c.rotary_dim, c.rope_theta, full)  # (A,rotary_dim/2)

        layers = zip(self.model.layers, self.k, self.v, self.change, plans, strict=True)
        for block, held_k, held_v, change, (due, most, row, rank) in layers:
            attn, normed = block.attn, block.attn_norm(x)
            v = attn.v(normed)  # (R,A,Hkv*D)
            alike = F.cosine_similarity(v.to(full), held_v[:, asked].to(full), dim=-1).float()  # (R,A)
            order = alike.masked_fill(given, 2).masked_fill(due, -2).argsort(dim=1, stable=True)[:, :most]  # (R,M)
            h, rotary = normed[rows, order], (cos[order][:, None], sin[order][:, None])
            q = rotate(attn.q_norm(attn.heads(attn.q(h))), *rotary)  # (R,H,M,D)
            k = rotate(attn.k_norm(attn.heads(attn.k(h))), *rotary)  # (R,Hkv,M,D)
            here = row, order[row, rank]  # the N places among the columns asked
            there = row, asked[here[1]]  # and on the canvas
            held_k[there], held_v[there] = k.transpose(1, 2).flatten(2)[row, rank], v[here]
            y = attend(q, attn.heads(held_k), attn.heads(held_v), attn_mask)  # (R,H,M,D)
            y = attn.o(y.transpose(1, 2).flatten(2)[row, rank])  # (N,C)
            change[there] = y + block.ffn(block.ffn_norm(x[here] + y))
            x = x + change[:, asked]
        self.out[:, asked] = x
