"""Use how tokens are spelled, to learn more from a small text: give new models similar embeddings for tokens of similar
spelling, and split some tokens of the training text into others (BPE-dropout).

A small text has most tokens a few times only. What a model learns about " return" then helps with " returns" too.
"""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from random import Random

import numpy as np
import torch
from torch import Generator, Tensor

from ..text.tokenizer import Tokenizer

VARIANTS = 16  # spellings of a token that are drawn from


def spelled(tokenizer: Tokenizer, width: int, rng: Generator) -> Tensor:
    """Return a vector for each token, (V,width) with deviation 1: the sum of a random vector for every run of one to
    four characters in it, with a blank at both ends, as fastText has for words (arXiv:1607.04606, section 3.2)."""
    tokens = [f" {tokenizer.inner.id_to_token(id) or id} " for id in range(tokenizer.vocab_size)]
    grams = [[t[i : i + n] for n in range(1, 5) for i in range(len(t) - n + 1) if t[i : i + n] != " "] for t in tokens]
    number = {gram: i for i, gram in enumerate(dict.fromkeys(gram for each in grams for gram in each))}
    vectors = torch.randn(len(number), width, generator=rng)
    sums = torch.stack([vectors[[number[gram] for gram in each]].sum(0) for each in grams])
    return sums / sums.std(1, keepdim=True)


class Spellings:
    """Spell each token in one of VARIANTS ways: BPE-dropout (arXiv:1910.13267, algorithm 1) of single tokens. Each way
    is made by the merges of byte-pair encoding, where every merge that could be next is left out with a probability
    `dropout`. Most are the token itself, and so are all of a token that merges do not make."""

    def __init__(self, tokenizer: Tokenizer, dropout: float, seed: int) -> None:
        model = json.loads(tokenizer.to_json())["model"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", ())]
        self.rank = {tuple(merge): rank for rank, merge in enumerate(merges)}
        self.id_of = model["vocab"] if merges else {}
        self.token_of = {id: token for token, id in self.id_of.items() if id not in tokenizer.special_ids}
        self.dropout, self.seed = dropout, seed
        self.variants: dict[int, list[list[int]]] = {}  # of each token that a batch had so far
        self.differs = np.zeros((tokenizer.vocab_size, VARIANTS), bool)  # whether they are not the token itself

    def spell(self, token: str, dropout: float, rng: Random) -> list[int]:
        """Return the ids that stand for this token, with some merges left out."""
        parts = list(token)
        while found := [
            (self.rank[pair], i)
            for i, pair in enumerate(pairwise(parts))
            if pair in self.rank and rng.random() >= dropout
        ]:
            _, i = min(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.id_of[part] for part in parts]

    def draw(self, id: int) -> None:
        """Draw the spellings of a token; they depend on the seed and on the token alone."""
        rng, token = Random(f"{self.seed} {id}"), self.token_of.get(id)
        merged = token is not None and self.spell(token, 0.0, rng) == [id]
        self.variants[id] = [self.spell(token, self.dropout, rng) if merged else [id] for _ in range(VARIANTS)]
        self.differs[id] = [spelling != [id] for spelling in self.variants[id]]

    def batches(self, drawn: Callable[[int], Iterator[Tensor]], start: int) -> Iterator[Tensor]:
        """Yield batches (B,T) as `drawn` from number `start` on, each token in one of its spellings; rows are cut to T.
        Batch n depends on the seed, on the batch that is drawn, and on n alone."""
        for number, batch in enumerate(drawn(start), start):
            for id in set(batch.unique().tolist()) - self.variants.keys():
                self.draw(id)
            which = np.random.default_rng((self.seed, number, VARIANTS)).integers(VARIANTS, size=batch.shape)
            rows = batch.tolist()
            for row, column in np.argwhere(self.differs[batch.numpy(), which])[::-1]:  # from the end: places stay right
                rows[row][column : column + 1] = self.variants[rows[row][column]][which[row, column]]
            yield torch.tensor([row[: batch.shape[1]] for row in rows])
