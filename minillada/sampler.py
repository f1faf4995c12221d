"""The denoising loop. `stream` yields one `Step` per evaluation of the model; whatever one wants to see or measure is a
`for` loop over it. `generate` is such a loop.

Shapes: B batch, T sequence, W window, N holes asked about, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .errors import TINY, BadInput, check_number, check_one_of, check_whole
from .model import KVCache, ModelConfig
from .strategies import COMMITS, SCORES, Rule, draw, guided, named

REVISIONS = {"none": None}

# After a window's first evaluation, which columns are computed again? The rest of the keys and values is kept, and goes
# out of date: prefix and dual are approximations (arXiv:2505.22618), exact only for a model of one layer.
CACHES: dict[str, Callable[[slice, int], slice]] = {
    "none": lambda window, length: slice(0, length),
    "prefix": lambda window, length: slice(window.start, length),
    "dual": lambda window, length: window,
}


@dataclass(frozen=True)
class SampleConfig:
    """How to decode. The defaults are the official ones but for the window (`block_len`), which is the paper's 32."""

    gen_len: int = 128  # new tokens
    steps: int = 128  # over all windows together
    block_len: int = 32  # width of a window; gen_len: one window, "pure diffusion"
    temperature: float = 0.0
    remasking: str = "low_confidence"  # low_confidence | random | margin | entropy
    cfg_scale: float = 0.0  # w of the papers; 0: off
    commit: str = "quota"  # quota | threshold:0.9 | factor:1 | entropy-bound:0.1 | ancestral | first-hitting
    revise: str = "none"
    top_k: int = 0
    top_p: float = 1.0
    cache: str = "none"  # none | prefix | dual; the last two are approximations
    ban_eos: bool = False  # never write a stop id (the paper's logits_eos_inf)
    defer_eos: bool = False  # commit stop ids last (confidence_eos_eot_inf)
    stop_at_eos: bool = True  # what follows a stop id is not computed
    stop_ids: tuple[int, ...] | None = None  # None: the model's eos_id

    def __post_init__(self) -> None:
        for name in ("gen_len", "steps", "block_len"):
            check_whole(name, getattr(self, name), 1)
        check_whole("top_k", self.top_k, 0)
        check_number("temperature", self.temperature)
        check_number("cfg_scale", self.cfg_scale)
        check_number("top_p", self.top_p, TINY, 1.0)
        for name, table in (("remasking", SCORES), ("cache", CACHES), ("revise", REVISIONS)):
            check_one_of(name, getattr(self, name), table)
        named(COMMITS, "commit", self.commit)
        if self.gen_len % self.block_len:
            divisors = [d for d in range(self.gen_len, 0, -1) if self.gen_len % d == 0]
            near = min(divisors, key=lambda d: abs(d - self.block_len))
            expected = f"a divisor of gen_len {self.gen_len}"
            raise BadInput(f"block_len: expected {expected}, got {self.block_len}; try {near}")
        windows = self.gen_len // self.block_len
        if self.steps % windows:
            near = max(1, self.steps // windows) * windows
            raise BadInput(f"steps: expected a multiple of the {windows} windows, got {self.steps}; try {near}")


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


class Step(NamedTuple):
    """What one evaluation did. All tensors (B,T); nothing is changed later, so steps may be kept."""

    x: Tensor  # the canvas after this step
    proposed: Tensor  # the token drawn for every hole that could be committed; elsewhere x
    confidence: Tensor  # its score; NaN elsewhere
    committed: Tensor  # bool: written in this step
    revised: Tensor  # bool: turned back into holes in this step
    window: slice  # columns being decoded
    step: int  # from 0
    nfe: int  # evaluations of the model so far; guidance counts its two halves as one


def check_canvas(canvas: Canvas, config: SampleConfig, c: ModelConfig) -> None:
    x, valid = canvas.x, canvas.valid
    if x.dim() != 2 or x.dtype != torch.long or valid.shape != x.shape or valid.dtype != torch.bool or not x.numel():
        raise BadInput(f"canvas: expected x (B,T) long and valid (B,T) bool, got {x.dtype} {tuple(x.shape)}; mend it")
    if x.shape[1] > c.max_len:
        raise BadInput(f"canvas: expected at most {c.max_len} tokens, got {x.shape[1]}; shorten prompt or gen_len")
    if not valid.any(1).all():
        raise BadInput("canvas: expected a valid token in every row, got a row of nothing but padding; leave it out")
    if ((x < 0) | (x >= c.vocab_size)).any():
        bad = x[(x < 0) | (x >= c.vocab_size)][0].item()
        raise BadInput(f"token: expected an id from 0 to {c.vocab_size - 1}, got {bad}; use the model's tokenizer")
    if any(not 0 <= i < c.vocab_size or i == c.mask_id for i in stop_ids(config, c)):
        raise BadInput(f"stop_ids: expected ids below {c.vocab_size}, not the mask, got {config.stop_ids}; mend them")


def stop_ids(config: SampleConfig, c: ModelConfig) -> list[int]:
    if config.stop_ids is not None:
        return list(config.stop_ids)
    return [] if c.eos_id is None else [c.eos_id]


def windows(hole: Tensor, width: int) -> list[slice]:
    """Tiles of this width from the first to the last hole of the batch; the last may be narrower."""
    columns = hole.any(0).nonzero().flatten().tolist()
    if not columns:
        return []
    return [slice(a, min(a + width, columns[-1] + 1)) for a in range(columns[0], columns[-1] + 1, width)]


def propose(
    logits: Tensor, config: SampleConfig, banned: Tensor, stop: Tensor, rng: Generator, where: str
) -> tuple[Tensor, Tensor]:
    """logits (N,V) -> a token and its confidence for every hole, (N,) each."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # in bfloat16 ties would reorder commits
    if not logits.amax(-1).isfinite().all():
        raise BadInput(f"logits at {where}: expected finite numbers, got NaN or infinity; check the weights")
    if config.ban_eos:
        logits = logits.index_fill(-1, stop, -torch.inf)
    tokens = draw(logits.index_fill(-1, banned, -torch.inf), config.temperature, config.top_k, config.top_p, rng)
    tokens = tokens.to(logits.device)
    confidence = SCORES[config.remasking](logits, tokens, rng)
    if config.defer_eos:
        confidence = confidence.masked_fill(torch.isin(tokens, stop), -1e30)  # finite: still a candidate, the last
    return tokens, confidence


def choose(score: Tensor, hole: Tensor, commit: Rule, left: int, steps: int, rng: Generator) -> Tensor:
    """score (N,) of the holes among hole (R,W) -> the ones to commit now, (R,W) bool; in the last step all of them."""
    if left == 1:
        return hole
    confidence = torch.full(hole.shape, -torch.inf, dtype=score.dtype, device=score.device)
    confidence[hole] = score
    ordered, order = confidence.sort(dim=1, descending=True, stable=True)
    due = commit(ordered, left, steps, rng)  # (R,)
    first = torch.arange(hole.shape[1], device=hole.device) < due[:, None]
    return torch.zeros_like(hole).scatter(1, order, first) & hole


def end_rows(x: Tensor, was_hole: Tensor, stop: Tensor, mask_id: int) -> Tensor:
    """Where a stop id was written and no hole precedes it, fill the holes after it: nobody will read them."""
    hole = x == mask_id
    ended = torch.isin(x, stop) & was_hole & (hole.cumsum(1) == 0)
    return torch.where(hole & (ended.cumsum(1) > 0), stop[0], x)


@torch.no_grad()
def stream(model: nn.Module, canvas: Canvas, config: SampleConfig, seed: int = 0) -> Iterator[Step]:
    """Fill the canvas's holes window by window, yielding every step (LLaDA, algorithms 4 and 5).

    Tokens outside the holes never change. `[MASK]` and ids past the vocabulary are never drawn. The last step of a
    window commits every hole left in it, so none remains. Raises BadInput, before the first evaluation for bad input.
    """
    c, commit = model.config, named(COMMITS, "commit", config.commit)
    check_canvas(canvas, config, c)
    x, device = canvas.x, canvas.x.device
    rng = Generator(device if device.type == "cuda" else "cpu").manual_seed(seed)
    stop = torch.tensor(stop_ids(config, c), dtype=torch.long, device=device)
    banned = torch.tensor([c.mask_id, *range(c.vocab_size, c.embedding_size)], device=device)
    was_hole, positions, nfe = x == c.mask_id, torch.arange(x.shape[1], device=device), 0
    tiles = windows(was_hole, config.block_len)
    steps = max(1, config.steps // max(1, len(tiles)))
    for window in tiles:
        rows = (x[:, window] == c.mask_id).any(1).nonzero().flatten()  # a row that has ended is not computed
        attn_mask = None if canvas.valid[rows].all() else canvas.valid[rows][:, None, None, :]
        denoise = guided(model, config.cfg_scale, ~was_hole[rows], c.mask_id) if config.cfg_scale else model
        cache = None if config.cache == "none" else KVCache()
        columns = slice(0, x.shape[1])  # to compute; all of them first
        for step in range(steps):
            hole = x[rows, window] == c.mask_id  # (R,W)
            if not hole.any():
                break
            row, column = hole.nonzero(as_tuple=True)
            keep = row * len(positions[columns]) + column + window.start - columns.start
            logits = denoise(x[rows, columns], attn_mask, positions[columns], keep, cache)  # (N,V)
            columns = CACHES[config.cache](window, x.shape[1])
            tokens, score = propose(logits, config, banned, stop, rng, f"step {nfe}, columns {window.start} on")
            chosen = choose(score, hole, commit, steps - step, steps, rng)

            proposed, confidence = x.clone(), torch.full(x.shape, torch.nan, device=device)
            committed = torch.zeros_like(was_hole)
            here = rows[row], column + window.start
            proposed[here], confidence[here], committed[here] = tokens, score.float(), chosen[row, column]
            x = torch.where(committed, proposed, x)
            if config.stop_at_eos and len(stop):
                x = end_rows(x, was_hole, stop, c.mask_id)
            nfe += 1
            yield Step(x, proposed, confidence, committed, torch.zeros_like(committed), window, nfe - 1, nfe)


def generate(
    model: nn.Module, prompts: Sequence[Sequence[int]], config: SampleConfig | None = None, seed: int = 0
) -> list[list[int]]:
    """The gen_len new tokens after each of several unequal prompts; cut before the first stop id if so configured."""
    config = config or SampleConfig()
    canvas = Canvas.continuation(prompts, config.gen_len, model.config, next(model.parameters()).device)
    for step in stream(model, canvas, config, seed):  # noqa: B007 the last one is the answer
        pass
    answers = step.x[:, -config.gen_len :].tolist()
    return [answer_of(answer, config, model.config) for answer in answers]


def answer_of(tokens: list[int], config: SampleConfig, c: ModelConfig) -> list[int]:
    """The tokens before the first stop id, or all of them without stop_at_eos."""
    ends = [i for i, token in enumerate(tokens) if config.stop_at_eos and token in stop_ids(config, c)]
    return tokens[: ends[0]] if ends else tokens
