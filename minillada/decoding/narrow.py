"""Leave out what nobody asks for: the last layer needs queries only where the question is."""

import torch
from torch import Tensor, nn

from ..model import Around, KVCache, LLaDA, attend, rotary_angles
from ..strategies import QUICKER, Ask, Whole


class Narrow(Whole):
    """Give the same logits (N,V) as `Whole`. The last layer computes queries for the window or, of a single row, for
    the columns asked about."""

    def __call__(self, ask: Ask, cache: KVCache | None = None) -> Tensor:
        model, (row, column), window = self.model, ask.where, ask.window
        positions = torch.arange(ask.x.shape[1], device=ask.x.device) if ask.positions is None else ask.positions
        x = model.embed(ask.x)  # (R,T,C)
        rotary = rotary_angles(positions, model.config, x.dtype)
        around = Around(rotary, positions, ask.attn_mask, cache)
        for layer in model.layers[:-1]:
            x = layer(x, around)
        last, mask = model.layers[-1], ask.attn_mask
        normed = last.attn_norm(x)
        k, v = last.attn.keys_and_values(normed, around)
        columns, there = (column, torch.arange(len(row))) if len(ask.x) == 1 else (window, column - window.start)
        q = last.attn.queries(normed[:, columns], tuple(angle[..., columns, :] for angle in rotary))  # (R,H,W|N,D)
        y = attend(q, k, v, mask[..., columns, :] if mask is not None and mask.shape[-2] > 1 else mask)
        y = y.transpose(1, 2).flatten(2)[row, there.to(row.device)]  # (N,H*D)
        x = x[row, column] + last.attn.o(y)
        return model.head(model.norm(x + last.ffn(last.ffn_norm(x))))


def quickest(model: nn.Module) -> Whole:
    """Return Narrow for a plain LLaDA, and Whole for one that is compiled, sharded or hooked, as Narrow skips hooks."""
    hooked = model._forward_hooks or model._forward_pre_hooks
    return Narrow(model) if type(model) is LLaDA and not hooked else Whole(model)


QUICKER[Whole] = quickest
