"""Noise a text block by block, and bound its likelihood as a block model sees it (BD3-LM, arXiv:2503.09573, eq. 5).

    -log p(x0)  <=  sum over blocks k of  E_t [ weight * sum of CE_i over the masked i of block k ]

Each block is a masked diffusion of its own, given the clean blocks before it. One evaluation of [xt ; x0], the noised
text and the clean one behind it, predicts all blocks at once. With one token in a block the bound is the exact
likelihood of an autoregressive model; with one block it is the bound of diffusion.py.

Shapes: B batch, T sequence, W tokens of a block, K = ceil(T / W) blocks, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..diffusion import Noised, exact_count, model_bound, sample_t
from ..model import block_causal


def block_levels(x0: Tensor, block: int, rng: Generator) -> Tensor:
    """Draw a masking level for every block of x0 (B,T), (B,K), one from each of B * K equal slices of (0,1], in random
    order; (B,1) in order for block 0, which is one block as long as the text.

    Without the random order block k would always be noised at about k/K, and the bound of one text would be biased.
    """
    if not block:
        return sample_t(len(x0), rng)[:, None]
    t = sample_t(len(x0) * -(-x0.shape[1] // block), rng)
    return t[torch.randperm(len(t), generator=rng)].view(len(x0), -1)


def noise_blocks(
    x0: Tensor, mask_id: int, t: Tensor, rng: Generator, block: int, maskable: Tensor | None = None,
    process: Callable[..., Noised] = exact_count,
) -> Noised:  # fmt: skip
    """Noise every block of x0 (B,T) by itself, at the levels t: (B,K), or (B,1) for all blocks of a row alike. With
    block 0 the text is one block.

    The weight is that of each token, (B,T): a block in which l of its m maskable tokens are masked has m/l. Without
    blocks it is that of each row, (B,).
    """
    if not block:
        return process(x0, mask_id, t.flatten(), rng, maskable)
    length, n_block = x0.shape[1], -(-x0.shape[1] // block)
    maskable = torch.ones_like(x0, dtype=torch.bool) if maskable is None else maskable
    cut = lambda x: F.pad(x, (0, n_block * block - length)).view(-1, block)  # (B*K,W); what is added is not maskable
    noised = process(cut(x0), mask_id, t.expand(-1, n_block).flatten(), rng, cut(maskable))
    joined = lambda x: x.view(len(x0), -1)[:, :length]
    return Noised(joined(noised.xt), joined(noised.masked), joined(noised.weight.repeat_interleave(block)))


def beside(length: int, block: int, device: torch.device | str | None = None) -> Tensor:
    """Return which places of [xt ; x0] may look at which, (2T,2T) bool: xt at its own block of xt and at the blocks of
    x0 before it; x0 at its own block of x0 and at those before it; none at a later one, and x0 never at xt.

    Two blocks of one token: xt [[T, F], [F, T]] and [[F, F], [T, F]]; x0 [[F, F], [F, F]] and [[T, F], [T, T]].
    """
    number = torch.arange(length, device=device) // block
    own, seen = number[:, None] == number, block_causal(number)
    return torch.cat([torch.cat([own, seen & ~own], 1), torch.cat([torch.zeros_like(own), seen], 1)])


def only_valid(look: Tensor, valid: Tensor) -> Tensor:
    """Hide padding: return look (S,S) without the places that are not valid (B,1,1,S), as (B,1,S,S). What is padding
    sees itself, since a softmax over nothing is NaN."""
    return look & valid | torch.eye(len(look), device=look.device).bool()


def attention(valid: Tensor, block: int = 0) -> Tensor | None:
    """Return the attn_mask that hides what is not valid (B,T) and, of a block model, later blocks: (B,1,1|T,T), or None
    if everything sees everything."""
    if not block:
        return None if valid.all() else valid[:, None, None, :]
    look = block_causal(torch.arange(valid.shape[1], device=valid.device) // block)
    return only_valid(look, valid[:, None, None, :])


class Beside(nn.Module):
    """Let a model predict the masked places of xt with the clean text x0 beside it: call it as one would the model."""

    def __init__(self, model: nn.Module | Callable[..., Tensor], x0: Tensor, block: int) -> None:
        super().__init__()
        self.model, self.x0, self.block = model, x0, block

    def forward(self, xt: Tensor, attn_mask: Tensor | None, where: tuple[Tensor, Tensor]) -> Tensor:
        """Return the logits of the places `where` of xt (B,T), (N,V). attn_mask: (B,1,1,T), which places are valid."""
        length = xt.shape[1]
        if self.block >= length:  # nobody would look at x0
            return self.model(xt, attn_mask=attn_mask, where=where)
        look, positions = beside(length, self.block, xt.device), torch.arange(length, device=xt.device)
        if attn_mask is not None:
            look = only_valid(look, attn_mask.repeat(1, 1, 1, 2))
        look = look.expand(len(xt), 1, -1, -1)  # guidance adds rows
        return self.model(torch.cat([xt, self.x0], 1), attn_mask=look, positions=positions.repeat(2), where=where)


def bound(model: nn.Module, x0: Tensor, noised: Noised, attn_mask: Tensor | None = None, block: int = 0) -> Tensor:
    """Return what `model_bound` does, (B,) nats, for a model with blocks of so many tokens; 0: full attention."""
    return model_bound(Beside(model, x0, block) if block else model, x0, noised, attn_mask)
