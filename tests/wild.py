"""A vocabulary that would break a page or a terminal, and runs made by hand."""

import tokenizers
import torch
from tokenizers import decoders, models

from minillada.sampler import Step
from minillada.text.tokenizer import Tokenizer

WILD = [
    "[MASK]", "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "\"'`&amp;&lt;<!--",
    "\x1b[2J\x1b]0;x\x07", "\x00\x08\x7f\x9b", "\u202eleft\u2066\u200f", "שלום", "مرحبا", "e\u0301\u0302\u0303",
    "\u0301", "漢字", "\u2028\u2029", "\U0001f469\u200d\U0001f467", "{{TITLE}}\\u003c", "\ufffe\uffff\ufffd", "]]>",
    "\n\n", "\t", "a\r\nb", "x" * 200, " the", "constructor", "__proto__", "]",
]  # fmt: skip


def wild_tokenizer() -> Tokenizer:
    inner = tokenizers.Tokenizer(models.WordLevel({word: id for id, word in enumerate(WILD)}, unk_token="]"))
    inner.decoder = decoders.Fuse()
    return Tokenizer(inner)


def by_hand(text: list[int], order: list[list[int]], mask_id: int = 0) -> list[Step]:
    """Steps that write the text on an empty canvas: in each, the positions listed. Proposed elsewhere: other ids."""
    final, x, steps = torch.tensor([text]), torch.full((1, len(text)), mask_id), []
    for step, positions in enumerate(order):
        hole = x == mask_id
        committed = torch.zeros_like(hole)
        committed[0, positions] = True
        proposed = torch.where(hole, torch.where(committed, final, (final + step) % len(WILD)), x)
        p = torch.full(x.shape, torch.nan).masked_fill(hole, 0.25)
        x = torch.where(committed, final, x)
        nothing = torch.zeros_like(hole)
        steps.append(Step(x, proposed, p, p, committed, nothing, slice(0, len(text)), step, step + 1))
    return steps
