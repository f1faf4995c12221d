"""The tokens being filled: prompts with holes after them, texts with holes anywhere, spans to be written anew.

Shapes: B batch, T sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .errors import BadInput
from .model import ModelConfig


@dataclass
class Canvas:
    """The tokens being filled: x (B,T) long with mask_id in its holes, and valid (B,T) bool, False for padding."""

    x: Tensor
    valid: Tensor

    @classmethod
    def continuation(
        cls, prompts: Sequence[Sequence[int]], gen_len: int, config: ModelConfig, device="cpu"
    ) -> "Canvas":
        """Unequal prompts, padded on the left, and gen_len holes after each."""
        longest = max(map(len, prompts), default=0)
        rows = [[*prompt, *[config.mask_id] * gen_len] for prompt in prompts]
        canvas = cls.infill(rows, config, device)
        if any(config.mask_id in prompt for prompt in prompts):
            raise BadInput(f"prompt: expected no mask id {config.mask_id}, got one; to fill holes use Canvas.infill")
        for x in (canvas.x, canvas.valid):
            for i, prompt in enumerate(prompts):
                x[i] = x[i].roll(longest - len(prompt))
        return canvas

    @classmethod
    def infill(cls, rows: Sequence[Sequence[int]], config: ModelConfig, device="cpu") -> "Canvas":
        """Unequal rows with mask_id wherever something is to be written, padded on the right."""
        if not rows or not all(len(row) for row in rows):
            raise BadInput(f"canvas: expected rows of at least one token, got {len(rows)} rows; give it something")
        filler = config.pad_id if config.pad_id is not None else (config.mask_id + 1) % config.vocab_size
        tensors = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
        valid = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in tensors], batch_first=True)
        return cls(pad_sequence(tensors, batch_first=True, padding_value=filler), valid)

    @classmethod
    def edit(
        cls, rows: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]], config: ModelConfig, device="cpu"
    ) -> "Canvas":
        """Unequal rows, in each of which the tokens from `start` up to `stop` of its span are to be written anew."""
        for row, (start, stop) in zip(rows, spans, strict=True):
            if not 0 <= start < stop <= len(row):
                raise BadInput(f"span: expected a part of the row's {len(row)} tokens, got {start}:{stop}; mend it")
        masked = ([*row[:a], *[config.mask_id] * (b - a), *row[b:]] for row, (a, b) in zip(rows, spans, strict=True))
        return cls.infill(list(masked), config, device)

    def check(self, c: ModelConfig) -> None:
        """Raise BadInput unless a model of this configuration can fill it."""
        x, valid = self.x, self.valid
        if (x.dim(), x.dtype, valid.dtype, valid.shape) != (2, torch.long, torch.bool, x.shape) or not x.numel():
            got = f"{x.dtype} {tuple(x.shape)} and {valid.dtype} {tuple(valid.shape)}"
            raise BadInput(f"canvas: expected x (B,T) long and valid (B,T) bool, got {got}; mend it")
        if x.shape[1] > c.max_len:
            raise BadInput(f"canvas: expected at most {c.max_len} tokens, got {x.shape[1]}; shorten prompt or gen_len")
        if not valid.any(1).all():
            raise BadInput("canvas: expected a valid token in every row, got one of nothing but padding; leave it out")
        strange = x[(x < 0) | (x >= c.vocab_size)]
        if len(strange):
            expected = f"an id from 0 to {c.vocab_size - 1}"
            raise BadInput(f"token: expected {expected}, got {strange[0].item()}; use the model's tokenizer")
