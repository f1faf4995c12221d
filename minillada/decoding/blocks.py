"""Decode a block model with a cache that is exact: what stands in finished blocks never changes, so their keys and
values are computed once (BD3-LM, arXiv:2503.09573; LLaDA2.0, arXiv:2512.15745).

Shapes: B rows of the canvas (rows B and above are those that guidance adds), R of them in a question, T sequence,
S columns up to the end of the window, H heads, D head width.
"""

import torch
from torch import Tensor

from ..model import KVCache, block_causal
from ..strategies import CACHES, Ask, MaskPredictor


class BlockCausal:
    """Ask about the blocks up to the window's end. Every place sees its own block and those before it, so what has been
    written changes nothing before it (arXiv:2503.09573)."""

    def __init__(self, predict: MaskPredictor) -> None:
        self.predict, self.config, self.device = predict, predict.config, predict.device

    def seen(self, ask: Ask) -> Tensor:
        """Return who may look at whom, (T,T) or (R,1,T,T). Padding sees itself: a softmax over nothing is NaN."""
        positions = torch.arange(ask.x.shape[1], device=ask.x.device) if ask.positions is None else ask.positions
        look = block_causal(positions // self.config.block)
        return look if ask.attn_mask is None else look & ask.attn_mask | torch.eye(len(look), device=look.device).bool()

    def __call__(self, ask: Ask) -> Tensor:
        stop = ask.window.stop
        return self.predict(ask._replace(x=ask.x[:, :stop], attn_mask=self.seen(ask)[..., :stop, :stop]))


class Slots(KVCache):
    """Remember keys and values of every layer for columns 0 to T - 1 of some rows, in slots that are made at once."""

    def __init__(self, n_row: int, length: int) -> None:
        super().__init__()
        self.n_row, self.length = n_row, length
        self.rows, self.columns = slice(0), slice(0)  # what the next evaluation is about

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (R,H,T,D) of the columns; return all that these rows hold up to them, (R,H,S,D) each."""
        if layer not in self.layers:
            slots = (self.n_row, k.shape[1], self.length, k.shape[3])
            self.layers[layer] = (k.new_zeros(slots), v.new_zeros(slots))
        for held, new in zip(self.layers[layer], (k, v), strict=True):
            held[self.rows, :, self.columns] = new
        held_k, held_v = (held[self.rows, :, : self.columns.stop] for held in self.layers[layer])
        return held_k, held_v


class BlockCache(BlockCausal):
    """Evaluate a block alone, with the keys and values of the blocks before it.

    The first evaluation of a block includes the block before it, whose last tokens were written after it had been
    evaluated. So a finished block costs no evaluation of its own.
    """

    def __init__(self, predict: MaskPredictor, given: Tensor) -> None:
        super().__init__(predict)
        self.n_row, self.length = given.shape
        self.slots: Slots | None = None
        self.window: slice | None = None  # what was asked about last
        self.final = torch.zeros(2 * self.n_row, dtype=torch.long)  # the slots of these columns hold a row's last word

    def __call__(self, ask: Ask) -> Tensor:
        window = ask.window
        if self.slots is None:
            guided = bool((ask.rows >= self.n_row).any())
            self.slots = Slots(self.n_row * (1 + guided), self.length)
        start = window.start
        if window != self.window:
            rows = ask.rows.cpu()
            start, self.window, self.final[rows] = int(self.final[rows].min()), window, window.start
            self.slots.rows = slice(None) if len(rows) == self.slots.n_row else ask.rows  # a slice copies nothing
        self.slots.columns = columns = slice(start, window.stop)
        row, column = ask.where
        return self.predict(
            ask._replace(
                x=ask.x[:, columns],
                where=(row, column - start),
                window=slice(window.start - start, window.stop - start),
                attn_mask=self.seen(ask)[..., columns, : window.stop],
                positions=torch.arange(start, window.stop, device=ask.x.device),
            ),
            self.slots,
        )


def sees_all(predict: MaskPredictor) -> bool:
    """Tell whether a block model's predictor looks beyond its blocks. llama.cpp's has an exact cache of its own."""
    return bool(predict.config.block) and not getattr(predict, "by_blocks", False)


def blocks(predict: MaskPredictor, given: Tensor) -> MaskPredictor:
    """Return a predictor of a block model, without a cache. A model that sees everything is returned as it is."""
    return BlockCausal(predict) if sees_all(predict) else predict


def block_cache(predict: MaskPredictor, given: Tensor) -> MaskPredictor:
    """Return a predictor of a block model with the cache. A model that sees everything is returned as it is: its only
    block is the whole canvas, and nothing of it is finished before the end."""
    return BlockCache(predict, given) if sees_all(predict) else predict


CACHES |= {"blocks": lambda: blocks, "block": lambda: block_cache}
