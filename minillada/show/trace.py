"""Turn a run of `Step`s into events: which token was proposed, committed or taken back, where, when, how probable.
Shapes: S steps, T sequence, E events."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
import torch

from ..errors import BadInput
from ..sampler import Step
from ..text.tokenizer import Tokenizer, display

REVISED, PROPOSED, COMMITTED, ENDED = range(4)  # kinds of event, in the order of one step; ENDED: after a stop id
LONGEST = 8  # tokens that one character may be spread over


@dataclass(frozen=True)
class Trace:
    """Hold what happened to one row of a canvas; `record` makes one. Events (E,) are sorted by position, step and kind,
    which is their order within a step. A proposal is an event only where it differs from that of the step before."""

    tokenizer: Tokenizer
    given: np.ndarray  # (T,) the canvas before the first step
    final: np.ndarray  # (T,) and after the last
    n_steps: int
    position: np.ndarray  # (E,)
    step: np.ndarray  # (E,) from 0
    kind: np.ndarray  # (E,) one of the four above
    token: np.ndarray  # (E,) mask_id where one was taken back
    probability: np.ndarray  # (E,) that the model gave to the token; NaN where there is none
    rivals: dict[tuple[int, int], tuple[list[int], list[float]]] = field(default_factory=dict)  # (step, position) ->
    picture: str = ""  # what the text is about, as a `data:` URL

    @classmethod
    def record(
        cls, steps: Iterable[Step], tokenizer: Tokenizer, row: int = 0, start: int = 0, picture: str = ""
    ) -> "Trace":
        """Collect the events of a row from column start on, rivals too if it has some. Raises BadInput if no steps."""
        names = ("x", "proposed", "probability", "committed", "revised")
        kept, rivals = [], {}
        for step in steps:
            kept.append([getattr(step, name)[row, start:] for name in names])
            if step.rivals is not None:
                places = step.committed.nonzero().tolist()
                found = zip(places, *(column.tolist() for column in step.rivals), strict=True)
                rivals |= {(len(kept) - 1, place - start): (ids, p) for (r, place), ids, p in found if r == row}
        if not kept:
            raise BadInput("trace: expected at least one step, got none; give a canvas with holes")
        columns = (torch.stack(column).cpu().numpy() for column in zip(*kept, strict=True))
        x, proposed, probability, committed, revised = columns  # (S,T)
        mask_id, asked = tokenizer.mask_id, ~np.isnan(probability)
        before = np.where(asked, mask_id, proposed)  # after what was taken back, before what was committed
        before[1:] = np.where(revised[1:], mask_id, x[:-1])  # a token may be asked about, and overwritten
        again = np.zeros_like(asked)
        again[1:] = (asked & ~committed)[:-1] & (proposed[1:] == proposed[:-1])
        where = {
            REVISED: revised,
            PROPOSED: asked & ~committed & ~again & (before == mask_id),
            COMMITTED: committed,
            ENDED: (before == mask_id) & ~committed & (x != mask_id),
        }
        parts = []
        for kind, there in where.items():
            s, p = there.nonzero()
            token = (proposed if kind == PROPOSED else x)[s, p] if kind != REVISED else np.full_like(s, mask_id)
            sure = probability[s, p] if kind in (PROPOSED, COMMITTED) else np.full(len(s), np.nan)
            parts.append((p, s, np.full_like(s, kind), token, sure))
        position, step, kind, token, sure = map(np.concatenate, zip(*parts, strict=True))
        order = np.lexsort((kind, step, position))
        events = (column[order] for column in (position, step, kind, token, sure))
        return cls(tokenizer, before[0], x[-1], len(kept), *events, rivals, picture)

    def frame(self, n: int) -> tuple[list[int], list[float], list[bool], list[bool]]:
        """Return the row after n steps: tokens, probability of each of ours, and what was committed and revised now."""
        tokens, held = self.given.copy(), np.full(len(self.given), np.nan)
        done = (self.step < n) & (self.kind != PROPOSED)
        now = done & (self.step == n - 1)
        tokens[self.position[done]] = self.token[done]  # in rising order, so the last one stays
        held[self.position[done]] = self.probability[done]
        new, back = np.zeros((2, len(tokens)), bool)
        new[self.position[now & (self.kind == COMMITTED)]] = True
        back[self.position[now & (self.kind == REVISED)]] = True
        return tokens.tolist(), held.tolist(), new.tolist(), back.tolist()

    def texts(self, tokens: np.ndarray) -> list[str]:
        """Return what each token shows alone, with nothing that a terminal would obey."""
        return [display(self.tokenizer.token(int(token))) for token in tokens]

    def joined(self) -> list[tuple[int, int, str]]:
        """Return (first position, how many, text) where tokens of the final canvas make a character only together."""
        found, free, broken = [], 0, ["\ufffd" in text for text in self.texts(self.final)]
        for at, n in product(range(len(broken)), range(2, LONGEST + 1)):
            if at >= free and at + n <= len(broken) and all(broken[at : at + n]):
                text = display(self.tokenizer.decode(self.final[at : at + n].tolist(), skip_special=False))
                if "\ufffd" not in text:
                    found.append((at, n, text))
                    free = at + n
        return found

    def edits(self) -> int:
        """Count how often a token was overwritten by another one, without becoming a hole in between."""
        events = [(p, k) for p, k in zip(self.position, self.kind, strict=True) if k in (REVISED, COMMITTED)]
        return sum(a == b == (a[0], COMMITTED) for a, b in pairwise(events))

    def spans(self) -> Iterator[tuple[int, int, int, int, float]]:
        """Yield (position, token, first step, step in which it was gone or n_steps, probability) of every token."""
        events = list(zip(self.position, self.step, self.kind, self.token, self.probability, strict=True))
        events = [event for event in events if event[2] != PROPOSED]
        for (p, s, kind, token, sure), (after, until, *_) in pairwise([*events, (-1, 0)]):
            if kind != REVISED:
                yield int(p), int(token), int(s), int(until) if after == p else self.n_steps, float(sure)

    def board(self, side: int) -> list[tuple[int, str]]:
        """Return (position, given digit or "") of the cells of a board, in reading order: after `1..3…=`, the places
        behind the `=`, one token each; without a `=`, the first places. Raises BadInput if there are too few."""
        texts, n = self.texts(self.given), side * side
        start = texts.index("=") + 1 if "=" in texts else 0
        if side < 1 or start + n > len(texts):
            raise BadInput(f"board: expected {n} cells, got {len(texts) - start} places; trace a board of side {side}")
        asked = "".join(texts[: max(0, start - 1)])[-n:].rjust(n, ".")
        held = zip(texts[start:], self.given[start:], asked, strict=False)
        clues = [text if token != self.tokenizer.mask_id else sign.strip(".") for text, token, sign in held]
        return list(enumerate(clues, start))
