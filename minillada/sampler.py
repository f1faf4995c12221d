"""The denoising loop. `stream` yields one `Step` per evaluation of the model; whatever one wants to see or measure is a
`for` loop over it. `generate` is such a loop.

Shapes: B batch, R rows that still have holes, T sequence, W window, N holes asked about, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from .canvas import Canvas
from .decoding.klass import klass
from .decoding.refresh import Refresh
from .decoding.revisions import REVISIONS
from .errors import TINY, BadInput, check_number, check_one_of, check_whole
from .model import KVCache, ModelConfig
from .strategies import RULES, SCORES, Method, Now, Score, draw, guided, named

COMMITS = RULES | {"klass": klass}


class CachePolicy(NamedTuple):
    """What is kept from step to step, and goes out of date: approximations, all but the empty policy."""

    columns: Callable[[slice, int], slice] | None = None  # those computed again after a window's first evaluation
    wrap: Callable[..., Callable] | None = None  # (model, given) -> a model that remembers, through all windows


def refreshing(prompt_every: int = 50, answer_every: int = 7, share: float = 0.25) -> CachePolicy:
    Refresh.check(prompt_every, answer_every, share)
    return CachePolicy(wrap=partial(Refresh, prompt_every=prompt_every, answer_every=answer_every, share=share))


CACHES: dict[str, Callable[..., CachePolicy]] = {
    "none": lambda: CachePolicy(),
    "prefix": lambda: CachePolicy(lambda window, length: slice(window.start, length)),  # Fast-dLLM, arXiv:2505.22618;
    "dual": lambda: CachePolicy(lambda window, length: window),  # both are exact for a model of one layer
    "refresh": refreshing,  # dLLM-Cache
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
    commit: str = "quota"  # a name of COMMITS, with its parameters: "threshold:0.9"
    revise: str = "none"  # or a name of REVISIONS, which brings its own rule to commit: "remdm-cap:0.008"
    top_k: int = 0
    top_p: float = 1.0
    cache: str = "none"  # a name of CACHES: "refresh:50,7,0.25"; all but none are approximations
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
        check_one_of("remasking", self.remasking, SCORES)
        named(CACHES, "cache", self.cache)
        method_of(self.commit, self.revise)
        rule = self.commit.partition(":")[0]
        for name, clash, expected in (
            ("remasking", rule == "entropy-bound" and self.remasking != "entropy", "entropy with commit entropy-bound"),
            ("remasking", rule == "klass" and self.remasking != "low_confidence", "low_confidence with commit klass"),
            ("commit", self.revise != "none" and self.commit != "quota", "none beside revise, which brings its own"),
            ("cache", self.revise.startswith("wino") and self.cache != "none", "none with revise wino"),
        ):
            if clash:
                raise BadInput(f"{name}: expected {expected}, got {getattr(self, name)}; change one of the two")
        if self.gen_len % self.block_len:
            divisors = [d for d in range(self.gen_len, 0, -1) if self.gen_len % d == 0]
            near = min(divisors, key=lambda d: abs(d - self.block_len))
            expected = f"a divisor of gen_len {self.gen_len}"
            raise BadInput(f"block_len: expected {expected}, got {self.block_len}; try {near}")
        windows = self.gen_len // self.block_len
        if self.steps % windows:
            near = max(1, self.steps // windows) * windows
            raise BadInput(f"steps: expected a multiple of the {windows} windows, got {self.steps}; try {near}")


def method_of(commit: str, revise: str) -> Method:
    """The functions that these name, which have seen nothing yet. Raises BadInput."""
    method = named(COMMITS, "commit", commit)
    return method if revise == "none" else named(REVISIONS, "revise", revise)


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


def stop_ids(config: SampleConfig, c: ModelConfig) -> list[int]:
    if any(not 0 <= i < c.vocab_size or i == c.mask_id for i in config.stop_ids or ()):
        raise BadInput(f"stop_ids: expected ids below {c.vocab_size}, not the mask, got {config.stop_ids}; mend them")
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
    logits: Tensor,
    config: SampleConfig,
    score: Score | None,
    banned: Tensor,
    stop: Tensor,
    rng: Generator,
    where: str,
) -> tuple[Tensor, Tensor]:
    """logits (N,V) -> a token and its confidence for every hole, (N,) each."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # in bfloat16 ties would reorder commits
    if not logits.amax(-1).isfinite().all():
        raise BadInput(f"logits at {where}: expected finite numbers, got NaN or infinity; check the weights")
    if config.ban_eos:
        logits = logits.index_fill(-1, stop, -torch.inf)
    tokens = draw(logits.index_fill(-1, banned, -torch.inf), config.temperature, config.top_k, config.top_p, rng)
    tokens = tokens.to(logits.device)
    confidence = (score or SCORES[config.remasking])(logits, tokens, rng)
    if config.defer_eos:
        confidence = confidence.masked_fill(torch.isin(tokens, stop), -1e30)  # finite: still a candidate, the last
    return tokens, confidence


def plan(method: Method, config: SampleConfig, now: Now) -> tuple[Tensor, Tensor | None]:
    """The holes to ask the model about, (R,W) bool, and how many are due, (R,), if no answer can change that."""
    if now.left == 1:  # the last step of a window commits every hole
        return now.hole, now.holes()
    if not method.blind:
        return now.hole, None
    due = method.commit(None, now)
    if config.remasking == "random" and not config.defer_eos:  # chance decides: ask about its choice alone
        return surest(now.uniform().masked_fill(~now.hole, -torch.inf), due), due
    return now.hole & (due > 0)[:, None], due


def surest(confidence: Tensor, due: Tensor) -> Tensor:
    """As many of the surest of each row as are due (R,), of confidence (R,W), -inf where nothing is to commit: bool."""
    order = confidence.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(confidence.shape[1], device=confidence.device) < due[:, None]
    return torch.zeros_like(first).scatter(1, order, first) & (confidence > -torch.inf)


def end_rows(x: Tensor, was_hole: Tensor, stop: Tensor, mask_id: int) -> Tensor:
    """Where a stop id was written and no hole precedes it, fill the holes after it: nobody will read them."""
    hole = x == mask_id
    ended = torch.isin(x, stop) & was_hole & (hole.cumsum(1) == 0)
    return torch.where(hole & (ended.cumsum(1) > 0), stop[0], x)


@torch.no_grad()
def stream(model: nn.Module, canvas: Canvas, config: SampleConfig, seed: int = 0) -> Iterator[Step]:
    """Fill the canvas's holes window by window, yielding every step (LLaDA, algorithms 4 and 5).

    Given tokens never change. `[MASK]` and ids past the vocabulary are never drawn. The last step of a window commits
    every hole left in it, so none remains. A step that would commit nothing costs no evaluation. Raises BadInput,
    before the first evaluation for bad input.
    """
    c, x, nfe = model.config, canvas.x, 0
    canvas.check(c)
    stop = torch.tensor(stop_ids(config, c), dtype=torch.long, device=x.device)
    banned = torch.tensor([c.mask_id, *range(c.vocab_size, c.embedding_size)], device=x.device)
    rng = Generator(x.device if x.device.type == "cuda" else "cpu").manual_seed(seed)
    was_hole, positions = x == c.mask_id, torch.arange(x.shape[1], device=x.device)
    nothing, nan = torch.zeros_like(was_hole), torch.full(x.shape, torch.nan, device=x.device)
    held, revised = nan, nothing  # how sure of each token of ours; what became a hole again since the last yield
    policy = named(CACHES, "cache", config.cache)
    model = policy.wrap(model, ~was_hole) if policy.wrap else model
    tiles = windows(was_hole, config.block_len)
    steps = max(1, config.steps // max(1, len(tiles)))
    for window in tiles:
        wanted = (x[:, window] == c.mask_id).any(1) | (policy.wrap is not None)  # a row that has ended is not computed
        rows = wanted.nonzero().flatten()
        attn_mask = None if canvas.valid[rows].all() else canvas.valid[rows][:, None, None, :]
        method = method_of(config.commit, config.revise)
        denoise = guided(model, config.cfg_scale, ~was_hole[rows], c.mask_id) if config.cfg_scale else model
        denoise = method.watch(denoise, window, c.mask_id) if method.watch else denoise
        cache, columns = KVCache() if policy.columns else None, slice(0, x.shape[1])
        for left in range(steps, 0, -1):
            now = Now(x[rows, window] == c.mask_id, held[rows, window], left, steps, rng)
            if not now.hole.any() and method.revise is None:
                break
            ask, due = plan(method, config, now)
            row, column = ask.nonzero(as_tuple=True)
            if len(row):
                where = row, column + window.start - columns.start
                logits = denoise(x[rows, columns], attn_mask, positions[columns], where, cache)  # (N,V)
                columns = policy.columns(window, x.shape[1]) if policy.columns else columns
                at = f"step {nfe}, columns {window.start} on"
                tokens, score = propose(logits, config, method.score, banned, stop, rng, at)
            if method.revise and left > 1:
                back = nothing.clone()
                back[rows, window] = method.revise(now)
                x, held, revised = x.masked_fill(back, c.mask_id), held.masked_fill(back, torch.nan), revised | back
            if not len(row):
                continue
            sure = torch.full(ask.shape, -torch.inf, dtype=score.dtype, device=x.device)  # (R,W)
            sure[row, column] = score
            due = method.commit(sure.sort(dim=1, descending=True).values, now) if due is None else due
            proposed, confidence, committed = x.clone(), nan.clone(), nothing.clone()
            here = rows[row], column + window.start
            proposed[here], confidence[here], committed[here] = tokens, score.float(), surest(sure, due)[row, column]
            x, held = torch.where(committed, proposed, x), torch.where(committed, confidence, held)
            if config.stop_at_eos and len(stop):
                x = end_rows(x, was_hole, stop, c.mask_id)
            nfe += 1
            yield Step(x, proposed, confidence, committed, revised, window, nfe - 1, nfe)
            revised = nothing


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
