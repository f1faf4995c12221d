"""What happened on a canvas, as events: which token was proposed, committed or taken back, where, when, how surely.

A trace is a list of `Step`s made small. Shapes: S steps, T sequence, E events, N holes asked about, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from ..errors import BadInput
from ..sampler import SampleConfig, Step
from ..text.tokenizer import Tokenizer, display

REVISED, PROPOSED, COMMITTED, ENDED = range(4)  # kinds of event, in the order of one step; ENDED: after a stop id
LONGEST = 8  # tokens that one character may be spread over
Rivals = dict[tuple[int, int, int], tuple[list[int], list[float]]]  # (step, row, column) -> tokens, probabilities


def overhear(model: nn.Module, steps: Iterable[Step], rivals: Rivals | None = None, top: int = 5) -> Iterator[Step]:
    """The same steps, but confidence is the probability that the model itself gave to what was proposed.

    That is before guidance, temperature and bans, whatever the score was that decided the order (chance, an entropy).
    rivals: is told the `top` most probable tokens for each place where one was committed. It listens to the model's
    head, so the sampler does not know, and nothing is computed again. Raises BadInput for another model.
    """
    said: list[torch.Tensor] = []
    hook = model.head.register_forward_hook(lambda module, given, logits: said.append(logits))
    try:
        for step in steps:
            if not said:
                raise BadInput(
                    "model: expected the one that makes the steps, got a silent one; pass that, not compiled"
                )
            asked = ~step.confidence.isnan()
            logits = said.pop()[: int(asked.sum())].float()  # (N,V): guidance and shadows come after these
            total = logits.logsumexp(-1)
            probability = (logits.gather(-1, step.proposed[asked][:, None]).squeeze(-1) - total).exp()
            if rivals is not None:
                written = step.committed[asked]
                best = logits[written].topk(min(top, logits.shape[-1]))
                p = (best.values - total[written, None]).exp()
                places = step.committed.nonzero().tolist()
                found = zip(places, best.indices.tolist(), p.tolist(), strict=True)
                rivals.update({(step.step, *place): (ids, values) for place, ids, values in found})
            yield step._replace(
                confidence=torch.full_like(step.confidence, torch.nan).masked_scatter(asked, probability)
            )
    finally:
        hook.remove()


@dataclass(frozen=True)
class Trace:
    """One row of a canvas through a run. Make one with `record`.

    The events (E,) are sorted by position, then step, then kind: where a token was taken back and another one committed
    in one step, that is their order. A proposal is an event only where it differs from that of the step before.
    """

    tokenizer: Tokenizer
    given: np.ndarray  # (T,) the canvas before the first step
    final: np.ndarray  # (T,) and after the last
    n_steps: int
    position: np.ndarray  # (E,)
    step: np.ndarray  # (E,) from 0
    kind: np.ndarray  # (E,) one of the four above
    token: np.ndarray  # (E,) mask_id where one was taken back
    confidence: np.ndarray  # (E,) NaN where there is none
    rivals: dict[tuple[int, int], tuple[list[int], list[float]]] = field(default_factory=dict)  # (step, position) ->

    @classmethod
    def record(
        cls, steps: Iterable[Step], tokenizer: Tokenizer, row: int = 0, start: int = 0, rivals: Rivals | None = None
    ) -> "Trace":
        """The events of a row from column start on. Raises BadInput if there are no steps."""
        names = ("x", "proposed", "confidence", "committed", "revised")
        kept = [[getattr(step, name)[row, start:] for name in names] for step in steps]
        if not kept:
            raise BadInput("trace: expected at least one step, got none; give a canvas with holes")
        columns = (torch.stack(column).cpu().numpy() for column in zip(*kept, strict=True))
        x, proposed, confidence, committed, revised = columns  # (S,T)
        mask_id, asked = tokenizer.mask_id, ~np.isnan(confidence)
        before = np.where(asked, mask_id, proposed)  # after what was taken back, before what was committed
        again = np.zeros_like(asked)
        again[1:] = (asked & ~committed)[:-1] & (proposed[1:] == proposed[:-1])
        where = {
            REVISED: revised,
            PROPOSED: asked & ~committed & ~again,
            COMMITTED: committed,
            ENDED: (before == mask_id) & ~committed & (x != mask_id),
        }
        parts = []
        for kind, there in where.items():
            s, p = there.nonzero()
            token = (proposed if kind == PROPOSED else x)[s, p] if kind != REVISED else np.full_like(s, mask_id)
            sure = confidence[s, p] if kind in (PROPOSED, COMMITTED) else np.full(len(s), np.nan)
            parts.append((p, s, np.full_like(s, kind), token, sure))
        position, step, kind, token, sure = map(np.concatenate, zip(*parts, strict=True))
        order = np.lexsort((kind, step, position))
        mine = {(s, column - start): top for (s, r, column), top in (rivals or {}).items() if r == row}
        events = (column[order] for column in (position, step, kind, token, sure))
        return cls(tokenizer, before[0], x[-1], len(kept), *events, mine)

    def written(self) -> np.ndarray:
        """(T,) the step in which each position was committed for the last time; -1 for what was given."""
        step = np.full(len(self.given), -1)
        there = self.kind >= COMMITTED
        step[self.position[there]] = self.step[there]  # in rising order, so the last one stays
        return step

    def frame(self, n: int) -> tuple[list[int], list[float], list[bool], list[bool]]:
        """The row after n steps: its tokens, how sure each of ours was, what was committed and taken back just now."""
        tokens, held = self.given.copy(), np.full(len(self.given), np.nan)
        done = (self.step < n) & (self.kind != PROPOSED)
        now = done & (self.step == n - 1)
        tokens[self.position[done]] = self.token[done]  # in rising order, so the last one stays
        held[self.position[done]] = self.confidence[done]
        new, back = np.zeros_like(tokens, bool), np.zeros_like(tokens, bool)
        new[self.position[now & (self.kind == COMMITTED)]] = True
        back[self.position[now & (self.kind == REVISED)]] = True
        return tokens.tolist(), held.tolist(), new.tolist(), back.tolist()

    def texts(self, tokens: np.ndarray) -> list[str]:
        """What each token shows alone, harmless."""
        return [display(self.tokenizer.token(int(token))) for token in tokens]

    def joined(self) -> list[tuple[int, int, str]]:
        """(first position, how many, text) where tokens of the final canvas are a character only together."""
        found, at, broken = [], 0, ["\ufffd" in text for text in self.texts(self.final)]
        while at < len(broken):
            n = 1
            if broken[at]:
                for n in range(2, min(LONGEST, len(broken) - at) + 1):
                    text = display(self.tokenizer.decode(self.final[at : at + n].tolist(), skip_special=False))
                    if all(broken[at : at + n]) and "\ufffd" not in text:
                        found.append((at, n, text))
                        break
                else:
                    n = 1
            at += n
        return found

    def spans(self) -> Iterator[tuple[int, int, int, int, float]]:
        """Each token written: (position, token, first step, step in which it was gone or n_steps, confidence)."""
        events = list(zip(self.position, self.step, self.kind, self.token, self.confidence, strict=True))
        events = [event for event in events if event[2] != PROPOSED]
        for (p, s, kind, token, sure), (after, until, *_) in pairwise([*events, (-1, 0)]):
            if kind != REVISED:
                yield int(p), int(token), int(s), int(until) if after == p else self.n_steps, float(sure)


def in_order(steps: Iterable[Step], prompt_len: int, config: SampleConfig, mask_id: int) -> Iterator[int]:
    """The new tokens of a canvas of one row, from left to right, each as soon as no hole precedes it; where tokens may
    be taken back (`config.revise`), as soon as its window is done."""
    done, row = prompt_len, []
    for step in steps:
        row = step.x[0].tolist()
        settled = len(row) if config.revise == "none" else step.window.start
        while done < settled and row[done] != mask_id:
            yield row[done]
            done += 1
    yield from row[done:]


def feed(steps: Iterable[Step], streamer, prompt: Sequence[int], config: SampleConfig, mask_id: int) -> None:
    """Drive a Hugging Face-style streamer: `put` the prompt (1,T), then each new token (1,), and `end`.

    The first of config.stop_ids is the last that is put.
    """
    streamer.put(torch.tensor([list(prompt)]))
    for token in in_order(steps, len(prompt), config, mask_id):
        streamer.put(torch.tensor([token]))
        if config.stop_at_eos and token in (config.stop_ids or ()):
            break
    streamer.end()
