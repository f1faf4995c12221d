"""Pre-training as a run does it: on a text on disk, in several parts and processes, validated per character. What is
learned, and from which noise, is `Pretraining` of `train.py`. Shapes: B rows, T sequence, n windows."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Generator, Tensor, nn

from ..diffusion import PROCESSES, Noised, pretraining_loss, sample_t
from ..measure.blocks import block_levels, bound, noise_blocks
from ..measure.twin import shifted, shifted_loss
from ..text.ids import Tokens, batches, document_batches, document_rows, validation_batch, whole_documents
from ..text.tokenizer import Tokenizer
from ..train import Pretraining
from .config import RunConfig, TrainConfig
from .distributed import reduce, share, shares
from .edits import with_errors
from .optim import evaluation
from .spelling import Spellings

LEVELS = 10  # equal bins of (0,1]


def part_of(x0: Tensor, noised: Noised, rows: Tensor, config: RunConfig) -> tuple[Tensor, Noised]:
    """Return these rows of a batch and of its noise, on the config's device."""
    return x0[rows].to(config.device), Noised(*(x[rows] for x in noised)).to(config.device)


def losses_by_part(loss: Callable, model: nn.Module, x0: Tensor, noised: Noised, config: RunConfig) -> Iterator[Tensor]:
    """Yield loss(model, x0, noised), a mean over rows, of each part of a batch that this process has, over accumulate:
    their sum, averaged over processes, is the loss of the batch."""
    for rows in shares(model, len(x0), config.accumulate):
        with evaluation(config):
            part = loss(model, *part_of(x0, noised, rows, config)) / config.accumulate
        yield part


def above(t_min: float, process: Callable[..., Noised]) -> Callable[..., Noised]:
    """Return a process of `diffusion.PROCESSES` whose levels (0,1] are squeezed into (t_min,1]. At a low level the few
    masked tokens of a row count as much as the many at a high one, so their gradient is mostly noise."""
    return lambda x0, mask_id, t, *more: process(x0, mask_id, t_min + (1 - t_min) * t, *more)


class TextPretraining(Pretraining):
    """Predict the hidden tokens of a text."""

    def __init__(
        self, text: Tokens, config: TrainConfig, mask_id: int, eos_id: int | None = None, block: int = 0,
        vocab_size: int = 0, spellings: Spellings | None = None,
    ) -> None:  # fmt: skip
        size = config.batch_size, config.length, config.seed
        if config.rows == "documents":
            train, val = (whole_documents(tokens, eos_id) for tokens in (text.train, text.val))
            draw = partial(document_batches, text.train, train, *size)
            held = document_rows(text.val, val[np.linspace(0, len(val) - 1, 128).astype(int)], config.length)
        else:
            draw, held = partial(batches, text.train, *size), validation_batch(text.val, 128, config.length)
            draw = partial(spellings.batches, draw) if spellings is not None else draw
        process = PROCESSES[config.process]
        super().__init__(draw, held, mask_id, process if block else above(config.t_min, process))
        self.text, self.config, self.block, self.vocab_size, self.progress = text, config, block, vocab_size, 0.0
        self.spellings = spellings
        self.given = int(config.rows == "documents")  # columns that are never hidden: the end of text in front

    def maskable(self, x0: Tensor) -> Tensor | None:
        """Return which places of x0 (B,T) may be hidden; None: all."""
        return (torch.arange(x0.shape[1]) >= self.given).expand_as(x0) if self.given else None

    def noise(self, x0: Tensor, rng: Generator) -> tuple[Tensor, Noised]:
        if not (self.given or self.block or self.config.errors):
            return super().noise(x0, rng)
        t, maskable = block_levels(x0, self.block, rng), self.maskable(x0)
        noised = noise_blocks(x0, self.mask_id, t, rng, self.block, maskable, self.process)
        if self.config.errors:
            noised = with_errors(x0, noised, self.config.errors, self.vocab_size, self.mask_id, rng, maskable)
        return x0, noised

    def held_noise(self) -> tuple[Tensor, Noised]:
        if not (self.given or self.block):
            return super().held_noise()
        rng, x0 = Generator().manual_seed(0), self.held.repeat_interleave(2, dim=0)
        levels = torch.cat([sample_t(2, rng) for _ in self.held])[:, None]
        return x0, noise_blocks(x0, self.mask_id, levels, rng, self.block, self.maskable(x0))

    def block_loss(self, model: nn.Module, x0: Tensor, noised: Noised) -> Tensor:
        """Do what `pretraining_loss` does, for a block model."""
        return bound(model, x0, noised, block=self.block).mean() / x0.shape[1]

    def losses(self, model: nn.Module, batch: Tensor, rng: Generator) -> Iterator[Tensor]:
        """Yield this process's parts of the bound in nats per token; at first, of the twin's nats (`config.twin`)."""
        if self.progress < self.config.twin:
            asked = shifted(batch, self.mask_id, self.maskable(batch))
            yield from losses_by_part(shifted_loss, model, batch, asked, self.config)
        else:
            loss = self.block_loss if self.block else pretraining_loss
            yield from losses_by_part(loss, model, *self.noise(batch, rng), self.config)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict:
        """Return the bound of the held-out windows, each predicted without what stands before it, in nats per
        character, and the "levels" of `by_level`: the bound is the area under that curve, over characters per token."""
        x0, noised = self.held_noise()
        bounds = torch.full((len(x0),), -torch.inf)
        (mine,) = share(len(x0))
        for rows in mine.split(32):
            with evaluation(self.config):
                bounds[rows] = bound(model, *part_of(x0, noised, rows, self.config), block=self.block).cpu()
        bounds = reduce(bounds).double()  # (2n,), of all processes
        nats = bounds.view(-1, 2).mean(1).mean().item()  # of a window
        return {
            "bound": nats / x0.shape[1] / self.text.characters_per_token,
            "levels": [] if self.block else by_level(bounds, noised),
        }


def by_level(bounds: Tensor, noised: Noised) -> list[tuple[float, float]]:
    """Return (t, nats per masked token) at the middle of each bin of levels that has rows, from the bounds of rows."""
    count = noised.masked.sum(1)
    bins = (count * LEVELS - 1) // noised.masked.shape[1]  # masking level (0, 0.1] is bin 0
    zeros, weight = torch.zeros(LEVELS).double(), noised.weight.view(len(bounds), -1)[:, 0]
    nats, tokens = (zeros.index_add(0, bins, x.double()) for x in (bounds / weight, count))
    return [((i + 0.5) / LEVELS, (nats[i] / tokens[i]).item()) for i in range(LEVELS) if tokens[i]]


def examples_of(text: Tokens, tokenizer: Tokenizer, n: int = 3) -> dict[str, list[str]]:
    """Make things to try with a model from the first held-out sentences: the first half as a "prompt"; the sentence
    with three words as holes ("fill"), and the same with those words in [[brackets]] ("edit")."""
    found: dict[str, list[str]] = {"prompt": [], "fill": [], "edit": []}
    passage = " ".join(tokenizer.decode(text.val[:40_000].tolist()).split())
    for sentence in re.findall(r"(?<=[.!?] )[A-Z][^.!?()\[\]*`|_]{40,110}[.!?](?= )", passage)[:n]:
        words = [match.span() for match in re.finditer(r" [a-z]{3,}(?=[ ,.!?])", sentence)]
        hidden = words[1 :: max(1, len(words) // 3)][:3]
        cuts = [0, *(at for span in hidden for at in span), len(sentence)]
        pieces = [sentence[a:b] for a, b in pairwise(cuts)]  # kept, hidden, kept, ...
        holes = lambda word: "[MASK]" * len(tokenizer.encode(word))
        found["prompt"].append(sentence[: words[len(words) // 2][0]] if words else sentence)
        found["fill"].append("".join(holes(p) if i % 2 else p for i, p in enumerate(pieces)))
        found["edit"].append("".join(f" [[{p[1:]}]]" if i % 2 else p for i, p in enumerate(pieces)))
    return found
