"""Write text by removing masks. `stream` yields one `Step` per evaluation of the model; whatever one wants to see or
measure is a `for` loop over it, and `generate` is such a loop.

Shapes: B rows of the canvas, R of them with holes in the window, T sequence, W window, N places asked about.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .errors import BadInput, check_blocks, check_canvas, check_ids, check_one_of, check_sampling, named
from .model import ModelConfig

from .strategies import BLOCK_RULES, CACHES, COMMITS, REVISIONS, SCORES, Ask, Guess, Guided  # isort: skip
from .strategies import MaskPredictor, Method, Now, Whole, draw, probability, quick  # isort: skip

Rows = Sequence[Sequence[int]]
Device = torch.device | str
Model = nn.Module | MaskPredictor  # LLaDA, or whatever answers in its place


@dataclass
class Canvas:
    """Hold the tokens being filled: x (B,T) long with mask_id in its holes, and valid (B,T) bool, False for padding."""

    x: Tensor
    valid: Tensor

    @classmethod
    def continuation(cls, prompts: Rows, gen_len: int, config: ModelConfig, device: Device = "cpu") -> "Canvas":
        """Put gen_len holes behind each of several unequal prompts, and padding in front of the shorter ones. A block
        model gets more holes, up to the end of a block, so that all rows end where a block does."""
        if any(config.mask_id in prompt for prompt in prompts):
            raise BadInput(f"prompt: expected no mask id {config.mask_id}, got one; to fill holes use Canvas.infill")
        end = lambda prompt: gen_len + -(len(prompt) + gen_len) % max(1, config.block)
        return cls.infill([[*prompt, *[config.mask_id] * end(prompt)] for prompt in prompts], config, device, "left")

    @classmethod
    def infill(cls, rows: Rows, config: ModelConfig, device: Device = "cpu", padding: str = "right") -> "Canvas":
        """Take unequal rows with mask_id wherever something is to be written; shorter ones are padded on one side."""
        if not rows or not all(len(row) for row in rows):
            raise BadInput(f"canvas: expected rows of at least one token, got {len(rows)} rows; leave out empty rows")
        filler = config.pad_id if config.pad_id is not None else (config.mask_id + 1) % config.vocab_size
        tensors = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
        valid = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in tensors], True, False, padding)
        return cls(pad_sequence(tensors, True, filler, padding), valid)

    @classmethod
    def edit(cls, rows: Rows, spans: Rows, config: ModelConfig, device: Device = "cpu") -> "Canvas":
        """Take unequal rows and make holes of the tokens from `start` up to `stop` of each row's span."""
        for row, (start, stop) in zip(rows, spans, strict=True):
            if not 0 <= start < stop <= len(row):
                what = f"span: expected a part of the row's {len(row)} tokens, got {start}:{stop}"
                raise BadInput(f"{what}; choose 0 <= start < stop <= {len(row)}")
        masked = ([*row[:a], *[config.mask_id] * (b - a), *row[b:]] for row, (a, b) in zip(rows, spans, strict=True))
        return cls.infill(list(masked), config, device)

    def answers(self, x: Tensor, config: "SampleConfig", c: ModelConfig) -> list[list[int]]:
        """Return what was written behind the prompts of a continuation: its rows x (B,T) from their first hole on."""
        starts = (self.x == c.mask_id).long().argmax(1).tolist()
        return [answer_of(row[a : a + config.gen_len], config, c) for row, a in zip(x.tolist(), starts, strict=True)]


@dataclass(frozen=True)
class SampleConfig:
    """Say how to decode. The defaults are the official ones but for the window (`block_len`), the paper's 32."""

    gen_len: int = 128  # new tokens
    steps: int = 128  # over all windows together
    block_len: int = 32  # width of a window; gen_len: one window, "pure diffusion"
    temperature: float = 0.0
    remasking: str = "low_confidence"  # low_confidence | random | margin | entropy: which holes are filled first
    cfg_scale: float = 0.0  # w of the papers; 0: off
    commit: str = "quota"  # a name of COMMITS, with its parameters: "threshold:0.9"
    revise: str = "none"  # or a name of REVISIONS, which brings its own rule to commit: "remdm-cap:0.008"
    top_k: int = 0
    top_p: float = 1.0
    cache: str = "none"  # a name of CACHES: "refresh:50,7,0.25"; all but none and block are approximations
    block: int | None = None  # tokens of a block, which is a window; None: the model's own; 0: full attention
    banned_ids: tuple[int, ...] = ()  # never written
    ban_eos: bool = False  # never write a stop id (the paper's logits_eos_inf)
    defer_eos: bool = False  # commit stop ids last (confidence_eos_eot_inf)
    stop_at_eos: bool = True  # what follows a stop id is not computed
    stop_ids: tuple[int, ...] | None = None  # None: the model's eos_id

    def __post_init__(self) -> None:
        check_sampling(self)
        check_one_of("remasking", self.remasking, SCORES)
        named(CACHES, "cache", self.cache)
        method_of(self)


def method_of(config: SampleConfig) -> Method:
    """Make the method that a config names; it has seen nothing yet. Raises BadInput."""
    method = named(COMMITS | BLOCK_RULES, "commit", config.commit)
    return method if config.revise == "none" else named(REVISIONS, "revise", config.revise)


def stop_ids(config: SampleConfig, c: ModelConfig) -> list[int]:
    """Return the ids that end a text."""
    ends = () if c.eos_id is None else (c.eos_id,)
    return check_ids("stop_ids", ends if config.stop_ids is None else config.stop_ids, c)


class Step(NamedTuple):
    """Tell what one evaluation did. All tensors are (B,T) and never changed later, so steps may be stored."""

    x: Tensor  # the canvas after this step
    proposed: Tensor  # the token drawn for every place asked about; elsewhere x
    score: Tensor  # what decided the order; NaN where nothing was asked
    probability: Tensor  # what the mask predictor, guidance included, gave to the proposed token; NaN elsewhere
    committed: Tensor  # bool: written in this step
    revised: Tensor  # bool: turned back into holes since the step before
    window: slice  # columns being decoded
    step: int  # from 0
    nfe: int  # evaluations of the model so far; guidance counts its two halves as one
    rivals: tuple[Tensor, Tensor] | None = None  # (M,K) each: likeliest tokens of the M places committed, and their p


class Draft:
    """Hold a canvas while it is being written, and what the loop has to know about it."""

    def __init__(self, canvas: Canvas, c: ModelConfig, config: SampleConfig, seed: int, rivals: int) -> None:
        check_canvas(canvas.x, canvas.valid, c)
        self.x, self.valid, self.c, self.config, self.n_rivals = canvas.x, canvas.valid, c, config, rivals
        device = self.x.device
        self.given = self.x != c.mask_id
        self.held = torch.full(self.x.shape, torch.nan, device=device)  # the probability of each token of ours
        self.revised, self.nfe = torch.zeros_like(self.given), 0
        self.sound = torch.ones((), dtype=torch.bool, device=device)  # whether the last logits were finite
        self.stop = torch.tensor(stop_ids(config, c), dtype=torch.long, device=device)
        never = check_ids("banned_ids", config.banned_ids, c) + (self.stop.tolist() if config.ban_eos else [])
        self.never = torch.tensor(never, dtype=torch.long, device=device)
        self.no_text = torch.tensor([c.mask_id, *range(c.vocab_size, c.embedding_size)], device=device)
        self.rng = Generator(device if device.type == "cuda" else "cpu").manual_seed(seed)

    def now(self, rows: Tensor, window: slice, left: int, steps: int) -> Now:
        x, chance = self.x[rows, window], self.config.remasking == "random" and not self.config.defer_eos
        hole = x == self.c.mask_id
        return Now(x, hole, self.given[rows, window], self.held[rows, window], left, steps, chance, self.rng)

    def guess(self, predict: Callable[[Ask], Tensor], score: Callable, asked: Tensor, ask: Ask) -> Guess:
        """Ask for the places `asked` (R,W); draw a token for each and score it."""
        said = predict(ask)  # (N,V)
        said = said.to(torch.promote_types(said.dtype, torch.float32))  # in bfloat16 ties would reorder commits
        self.sound, self.at = said.amax(-1).isfinite().all(), f"step {self.nfe}, columns {ask.window.start} on"
        logits = said.index_fill(-1, self.never, -torch.inf) if len(self.never) else said
        config, drawable = self.config, logits.index_fill(-1, self.no_text, -torch.inf)
        tokens = draw(drawable, config.temperature, config.top_k, config.top_p, self.rng).to(said.device)
        scores = score(logits, tokens, self.rng)
        p = scores if score is probability and logits is said else probability(said, tokens)
        if config.defer_eos:
            scores = scores.masked_fill(torch.isin(tokens, self.stop), -1e30)  # finite: the last, but still a candidate
        self.said, empty = said, torch.zeros(asked.shape, dtype=scores.dtype, device=scores.device)
        x = self.x[ask.rows, ask.window].masked_scatter(asked, tokens)
        scores = (empty - torch.inf).masked_scatter(asked, scores)
        return Guess(x, scores, (empty + torch.nan).to(p.dtype).masked_scatter(asked, p))

    def take_back(self, rows: Tensor, window: slice, back: Tensor) -> None:
        """Turn the committed places `back` (R,W) into holes."""
        there = self.on_canvas(rows, window, back, False)
        self.x, self.held = self.x.masked_fill(there, self.c.mask_id), self.held.masked_fill(there, torch.nan)
        self.revised = self.revised | there

    def write(self, rows: Tensor, window: slice, guess: Guess, commit: Tensor, settled: Tensor) -> Step:
        """Write the proposed tokens of the places `commit` (R,W). In the settled rows (R,) the text may end."""
        asked = ~guess.probability.isnan()
        proposed = self.x.clone()
        proposed[rows, window] = torch.where(asked, guess.tokens, proposed[rows, window])
        score = self.on_canvas(rows, window, guess.score.float().masked_fill(~asked, torch.nan), torch.nan)
        p = self.on_canvas(rows, window, guess.probability, torch.nan)
        committed = self.on_canvas(rows, window, commit, False)
        self.x, self.held = torch.where(committed, proposed, self.x), torch.where(committed, p, self.held)
        if self.config.stop_at_eos and len(self.stop):
            self.end_rows(rows, settled)
        best = None
        if self.n_rivals:
            top = self.said[commit[asked]].softmax(-1).topk(min(self.n_rivals, self.said.shape[-1]))
            best = top.indices, top.values
        revised, self.revised = self.revised, torch.zeros_like(self.revised)
        self.nfe += 1
        return Step(self.x, proposed, score, p, committed, revised, window, self.nfe - 1, self.nfe, best)

    def on_canvas(self, rows: Tensor, window: slice, values: Tensor, elsewhere: float) -> Tensor:
        """Put values (R,W) in their place on the canvas: (B,T)."""
        canvas = torch.full(self.x.shape, elsewhere, dtype=values.dtype, device=values.device)
        canvas[rows, window] = values
        return canvas

    def end_rows(self, rows: Tensor, settled: Tensor) -> None:
        """Fill the holes behind a stop id that was written with no hole before it: nobody will read them."""
        hole = self.x == self.c.mask_id
        ended = torch.isin(self.x, self.stop) & ~self.given & (hole.cumsum(1) == 0)
        ended[rows] &= settled[:, None]
        self.x = torch.where(hole & (ended.cumsum(1) > 0), self.stop[0], self.x)


def predictor_of(model: Model, block: int | None = None) -> MaskPredictor:
    """Return a model as a mask predictor, one that is such already as it is; with `block`, if that is not None."""
    predict = quick(Whole)(model) if isinstance(model, nn.Module) else model
    if block not in (None, predict.config.block):
        predict = copy(predict)
        predict.config = replace(predict.config, block=block)
    return predict


@torch.no_grad()
def stream(model: Model, canvas: Canvas, config: SampleConfig, seed: int = 0, rivals: int = 0) -> Iterator[Step]:
    """Fill the canvas's holes window by window, yielding every step (LLaDA, algorithms 4 and 5).

    Given tokens never change. `[MASK]` and ids past the vocabulary are never drawn. A step that would commit nothing
    costs no evaluation. rivals: how many likeliest tokens to report for each place committed. Raises BadInput.
    """
    predict = predictor_of(model, config.block)
    draft = Draft(canvas, predict.config, config, seed, rivals)
    block, cache = check_blocks(config, draft.c)
    predict = named(CACHES, "cache", cache)(predict, draft.given)
    if config.cfg_scale:
        predict = Guided(predict, config.cfg_scale, draft.given)
    windows = method_of(config).windows(~draft.given, config.block_len, block)
    steps = -(-config.steps * block // config.gen_len) if block else max(1, config.steps // max(1, len(windows)))
    for window, method in ((window, method_of(config)) for window in windows):
        yield from fill(draft, predict, method, window, method.steps or steps)


def fill(draft: Draft, predict: Callable[[Ask], Tensor], method: Method, window: slice, steps: int) -> Iterator[Step]:
    """Fill one window in so many steps: ask, draw, take back, commit. The host waits for the device once a step."""
    rows = (draft.x[:, window] == draft.c.mask_id).any(1).nonzero().flatten()  # a row that has ended is not computed
    attn_mask = None if draft.valid[rows].all() else draft.valid[rows][:, None, None, :]
    predict, score = method.wrap(predict), method.score or SCORES[draft.config.remasking]
    for left in range(steps, 0, -1):
        now = draft.now(rows, window, left, steps)
        done = method.done(now) | ~draft.sound  # (R,)
        asked = (now.hole if left == 1 else method.ask(now)) & ~done[:, None]  # (R,W)
        row, column = asked.nonzero(as_tuple=True)
        if len(row):
            ask = Ask(draft.x[rows], (row, column + window.start), window, rows, attn_mask)
            guess = draft.guess(predict, score, asked, ask)
        elif done.all():
            break
        if left > 1 and (back := method.revise(now)) is not None:
            draft.take_back(rows, window, back)
        if len(row):
            commit = asked if left == 1 else method.commit(now, guess)
            yield draft.write(rows, window, guess, commit, method.settled(now))
    if not draft.sound:
        raise BadInput(f"logits at {draft.at}: expected finite numbers, got NaN or infinity; check the weights")


def generate(model: Model, prompts: Rows, config: SampleConfig | None = None, seed: int = 0) -> list[list[int]]:
    """Return the new tokens after each of several unequal prompts: gen_len, or those before the first stop id."""
    config = config or SampleConfig()
    predict = predictor_of(model, config.block)
    canvas = Canvas.continuation(prompts, config.gen_len, predict.config, predict.device)
    for step in stream(predict, canvas, config, seed):  # noqa: B007 the last one is the answer
        pass
    return canvas.answers(step.x, config, predict.config)


def answer_of(tokens: list[int], config: SampleConfig, c: ModelConfig) -> list[int]:
    """Return the tokens before the first stop id, or all of them without stop_at_eos."""
    ends = [i for i, token in enumerate(tokens) if config.stop_at_eos and token in stop_ids(config, c)]
    return tokens[: ends[0]] if ends else tokens
