"""The pieces of one denoising step: ask the model, draw a token for each hole, score it, choose which to commit.

Tables map the names that a user writes to these pieces; "threshold:0.9" gives a piece its parameter. The files of
`decoding/` add further names. A new way to decode is one small class and one line in a table.

Shapes: B rows of the canvas, R of them with holes in the window, T sequence, W window, N holes asked about.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn

from .model import KVCache, ModelConfig

# ---- ask: a mask predictor turns one question into logits ------------------------------------------------------------


class Ask(NamedTuple):
    """Ask a mask predictor: which tokens belong in the places `where` of these rows?"""

    x: Tensor  # (R,T) long, rows of the canvas
    where: tuple[Tensor, Tensor]  # row (N,) and column (N,), as in x[where]
    window: slice  # the columns being decoded; what a cache need not compute again lies outside
    rows: Tensor  # (R,) which rows of the canvas these are, so that a predictor can remember things about them
    attn_mask: Tensor | None = None  # bool (R,1,1|T,T), True = may look
    positions: Tensor | None = None  # (T,) long; 0..T-1 unless given


class MaskPredictor(Protocol):
    """Answer an `Ask` with logits (N,V): what LLaDA does, and guidance or a cache around it."""

    config: ModelConfig
    device: torch.device

    def __call__(self, ask: Ask) -> Tensor: ...


class Whole:
    """Let LLaDA be a mask predictor: evaluate the rows asked about; with a cache, maybe only some of their columns."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.config = model, model.config
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def __call__(self, ask: Ask, cache: KVCache | None = None) -> Tensor:
        return self.model(ask.x, ask.attn_mask, ask.positions, ask.where, cache)


class Guided:
    """Guide a predictor without a classifier: logits + scale * (logits - logits without the prompt) (LLaDA, eq. 16).

    The same rows with the whole prompt masked ride along in one batch of 2R, so any predictor can be guided.
    """

    def __init__(self, predict: MaskPredictor, scale: float, given: Tensor) -> None:
        self.predict, self.scale, self.given = predict, scale, given  # given (B,T): the prompt's places
        self.config, self.device = predict.config, predict.device

    def __call__(self, ask: Ask) -> Tensor:
        given = self.given[ask.rows]  # (R,T)
        given = given if ask.positions is None else given[:, ask.positions]
        row, column = ask.where
        both = ask._replace(
            x=torch.cat([ask.x, ask.x.masked_fill(given, self.config.mask_id)]),
            where=(torch.cat([row, row + len(ask.x)]), torch.cat([column, column])),
            rows=torch.cat([ask.rows, ask.rows + len(self.given)]),
            attn_mask=None if ask.attn_mask is None else torch.cat([ask.attn_mask, ask.attn_mask]),
        )
        conditional, unconditional = self.predict(both).chunk(2)  # (N,V) each
        return conditional + self.scale * (conditional - unconditional)


# ---- draw: logits (N,V) -> tokens (N,) -------------------------------------------------------------------------------


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, rng: Generator) -> Tensor:
    """Draw a token (N,) for each row of logits (N,V) from softmax(logits / temperature); temperature 0: the argmax.

    The choice is among the top_k likeliest ids (0: all) and the fewest that have the probability top_p together.
    """
    if logits.device.type == "mps" and temperature:  # Apple's GPUs have no float64
        logits = logits.cpu()
    if top_k and temperature:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1 and temperature:
        ordered, ids = logits.sort(descending=True)
        p = (ordered.double() / temperature).softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # [.6,.3,.1] and 0.7 -> [F,F,T]; never the likeliest
        logits = logits.masked_fill(beyond.scatter(-1, ids, beyond), -torch.inf)
    return quick(gumbel_argmax)(logits, temperature, rng)


def gumbel_argmax(logits: Tensor, temperature: float, rng: Generator) -> Tensor:
    """Draw an index (N,) from softmax(logits / temperature), logits (N,K): the argmax of logits + temperature * noise.

    The noise is -log(-log u), in float64: float32 has no noise above 16.6, which secretly lowers the temperature
    (arXiv:2409.02908, section 4).
    """
    if not temperature:
        return logits.argmax(-1)
    noise = -torch.empty(logits.shape, dtype=torch.float64, device=rng.device).exponential_(generator=rng).log()
    return (logits.double() + temperature * noise.to(logits.device)).argmax(-1)


QUICKER: dict[Callable, Callable] = {}  # where decoding/ registers functions that do the same in less time


def quick(function: Callable) -> Callable:
    """Return the quicker function that was registered for this one, or this one."""
    return QUICKER.get(function, function)


# ---- score: logits (N,V), tokens (N,) -> score (N,); the holes with the highest are committed first ------------------


def probability(logits: Tensor, tokens: Tensor, rng: Generator | None = None) -> Tensor:
    """Score by the probability of the token, without noise: "low-confidence remasking" (LLaDA, algorithm 5)."""
    return logits.softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def chance(logits: Tensor, tokens: Tensor, rng: Generator) -> Tensor:
    """Score by a random number: "random remasking" (LLaDA, algorithm 4)."""
    return torch.rand(len(tokens), generator=rng, device=rng.device).to(logits.device)


Score = Callable[[Tensor, Tensor, Generator], Tensor]
SCORES: dict[str, Score] = {"low_confidence": probability, "random": chance}

# ---- commit: which holes are written now? ----------------------------------------------------------------------------


class Now(NamedTuple):
    """Show a method what it may look at before a step: the window in the R rows that are being written."""

    x: Tensor  # (R,W) tokens
    hole: Tensor  # (R,W) bool
    given: Tensor  # (R,W) bool, the prompt's places
    held: Tensor  # (R,W) the probability that each token of ours had when it was committed; NaN elsewhere
    left: int  # steps of this window, this one included
    steps: int
    chance: bool  # scores are random numbers, so one may choose before asking
    rng: Generator

    def holes(self) -> Tensor:
        return self.hole.sum(1)  # (R,)

    def uniform(self) -> Tensor:
        """Draw a number between 0 and 1 for each place, (R,W)."""
        return torch.rand(self.hole.shape, generator=self.rng, device=self.rng.device).to(self.hole.device)


class Guess(NamedTuple):
    """Hold what was proposed for the places asked about."""

    tokens: Tensor  # (R,W) long; x elsewhere
    score: Tensor  # (R,W); -inf elsewhere
    probability: Tensor  # (R,W); NaN elsewhere


def surest(score: Tensor, due: Tensor) -> Tensor:
    """Mark in each row of score (R,W) the `due` (R,) highest, none at -inf: [.9,.2,.7], due 2 -> [T,F,T]."""
    order = score.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(score.shape[1], device=score.device) < due[:, None]
    return torch.zeros_like(first).scatter(1, order, first) & (score > -torch.inf)


class Method:
    """Decide how a window is decoded. Every published way is a subclass that changes one or two of these answers.

    It is made anew for every window and may remember what it saw there. The last step of a window commits every hole.
    """

    score: Score | None = None  # what the rule goes by, in place of the score that `remasking` names
    steps: int | None = None  # evaluations for a window; None: its share of the config's

    def windows(self, hole: Tensor, width: int, block: int = 0) -> list[slice]:
        """Cut the columns from the first to the last hole of the batch (B,T) into windows; the last may be narrower.
        The windows of a block model are its blocks, counted from the first column."""
        columns = hole.any(0).nonzero().flatten().tolist() or [0, -1]
        start, stop = (columns[0] // block * block, hole.shape[1]) if block else (columns[0], columns[-1] + 1)
        return [slice(a, min(a + (block or width), stop)) for a in range(start, columns[-1] + 1, block or width)]

    def wrap(self, predict: Callable[[Ask], Tensor]) -> Callable[[Ask], Tensor]:
        """Return the predictor to ask; a method that needs to see its logits wraps it."""
        return predict

    def ask(self, now: Now) -> Tensor:
        """Return the places to ask about, (R,W) bool."""
        return now.hole

    def commit(self, now: Now, guess: Guess) -> Tensor:
        """Return the places to write, (R,W) bool: holes, or tokens of ours that are to be overwritten."""
        return guess.score > -torch.inf

    def revise(self, now: Now) -> Tensor | None:
        """Return the committed places that become holes again, (R,W) bool, or None."""
        return None

    def done(self, now: Now) -> Tensor:
        """Return which rows need no further step, (R,) bool. Who takes tokens back goes on to the last step."""
        return ~now.hole.any(1) & (type(self).revise is Method.revise)

    def settled(self, now: Now) -> Tensor:
        """Return in which rows an end of text that was written counts from this step on, (R,) bool."""
        return torch.ones_like(now.hole[:, 0])


class Quota(Method):
    """Commit a number of the surest holes that does not depend on what the model predicts (LLaDA, algorithms 4, 5)."""

    def due(self, now: Now) -> Tensor:
        """Return that number for each row, (R,): ceil(holes left / steps left). 5 holes in 3 steps -> 2, 2, 1."""
        return (now.holes() + now.left - 1) // now.left

    def ask(self, now: Now) -> Tensor:
        self.n = self.due(now)
        if now.chance:  # the order is random: choose now, and ask about the chosen places alone
            return surest(now.uniform().masked_fill(~now.hole, -torch.inf), self.n)
        return now.hole & (self.n > 0)[:, None]

    def commit(self, now: Now, guess: Guess) -> Tensor:
        return surest(guess.score, self.n)


# name -> what makes it, called with the parameters behind the name. decoding/ adds to these tables.
COMMITS: dict[str, Callable[..., Method]] = {"quota": Quota}
REVISIONS: dict[str, Callable[..., Method]] = {}  # methods that take committed tokens back
BLOCK_RULES: dict[str, Callable[..., Method]] = {}  # rules to commit made for block models, some of which overwrite
CACHES: dict[str, Callable[..., Callable[[Whole, Tensor], MaskPredictor]]] = {
    "none": lambda: lambda predict, given: predict  # given (B,T) bool: the prompt's places
}
