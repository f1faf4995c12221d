"""LLaDA2.0 (arXiv:2512.15745) and LLaDA2.1 (arXiv:2602.08676): commit block by block what is sure; 2.1 also overwrites
tokens of its own that it no longer believes. `official` takes the arguments of the authors' `generate`.

Shapes: R rows, W tokens of a block.
"""

import torch
from torch import Tensor

from ..errors import BadInput
from ..sampler import SampleConfig
from ..strategies import BLOCK_RULES, Guess, Method, Now, probability, surest


class LLaDA2(Method):
    """Commit every hole with a probability above tau if they are at least this step's share of the block, W/steps; else
    that many of the surest."""

    score = staticmethod(probability)

    def __init__(self, tau: float = 0.95, steps: int = 32) -> None:
        self.tau, self.steps = tau, steps

    def commit(self, now: Now, guess: Guess) -> Tensor:
        share, more = divmod(now.x.shape[1], self.steps)  # the first steps take what the division leaves over
        due = torch.full_like(now.holes(), share + (self.steps - now.left < more))
        sure = guess.score > self.tau
        return torch.where((sure.sum(1) >= due)[:, None], sure, surest(guess.score, due))


class LLaDA21(Method):
    """In each step write the holes with a probability above tau, or `least` of the surest, and overwrite tokens of the
    block where another one has a probability above `edit`. A block is finished when an evaluation without holes
    overwrites nothing, or after `post` evaluations without holes. early: stop after a block that holds an end of text;
    it is looked for in finished blocks alone, since it may be overwritten."""

    score = staticmethod(probability)
    steps = 2**20  # `done` ends a block; every step before fills a hole or counts towards `post`

    def __init__(self, tau: float = 0.95, edit: float = 0.9, post: int = 16, least: int = 1, early: int = 1) -> None:
        self.tau, self.edit, self.post, self.least, self.early = tau, edit, post, least, early
        self.finished: Tensor | None = None  # (R,)
        self.full: Tensor | None = None  # (R,) how many evaluations had no hole

    def ask(self, now: Now) -> Tensor:
        if self.finished is None:
            self.finished, self.full = now.holes() < 0, torch.zeros_like(now.holes())
        return ~now.given & ~self.finished[:, None]

    def commit(self, now: Now, guess: Guess) -> Tensor:
        score = guess.score.masked_fill(~now.hole, -torch.inf)
        sure, had = score > self.tau, now.hole.any(1)
        least = torch.full_like(now.holes(), self.least)
        write = torch.where((sure.sum(1) >= least)[:, None], sure, surest(score, least))
        edit = ~now.hole & (guess.score > self.edit) & (guess.tokens != now.x)
        self.full = self.full + ~had
        steady = ~had & ~edit.any(1) | (self.full >= self.post)
        self.finished = self.finished | (steady & ~(now.hole & ~write).any(1))
        return write | edit

    def done(self, now: Now) -> Tensor:
        return ~now.hole.any(1) if self.finished is None else self.finished

    def settled(self, now: Now) -> Tensor:
        return self.finished & bool(self.early)


BLOCK_RULES |= {
    "llada2": LLaDA2,
    "llada2.1": LLaDA21,
    "llada2.1-quality": lambda: LLaDA21(0.7, 0.5),  # the authors' two modes
    "llada2.1-speed": lambda: LLaDA21(0.5, 0.0),
}


def official(
    version: str | float, *, gen_length: int = 512, block_length: int = 32, steps: int = 32, threshold: float = 0.95,
    editing_threshold: float = 0.9, max_post_steps: int = 16, num_to_transfer: int = 1, minimal_topk: int = 1,
    eos_early_stop: bool = False, temperature: float = 0.0, eos_id: int | None = None, mask_id: int | None = None,
) -> SampleConfig:  # fmt: skip
    """Return how the authors' `generate` decodes with these arguments: LLaDA2.0's (version "2.0") or LLaDA2.1's.

    block_length is used whatever blocks the model has. steps and minimal_topk are 2.0's alone; editing_threshold,
    max_post_steps and num_to_transfer 2.1's. mask_id is the model's, which knows it. Raises BadInput.
    """
    if str(version) == "2.0":
        commit = f"llada2:{threshold},{max(1, min(steps, gen_length // minimal_topk))}"
    elif str(version) == "2.1":
        commit = f"llada2.1:{threshold},{editing_threshold},{max_post_steps},{num_to_transfer},{int(eos_early_stop)}"
    else:
        raise BadInput(f"version: expected 2.0 or 2.1, got {version}; choose one")
    whole = {"gen_len": gen_length, "steps": gen_length, "block_len": gen_length, "block": block_length}
    stop_ids = None if eos_id is None else (eos_id,)
    return SampleConfig(**whole, commit=commit, temperature=temperature, cache="block", stop_ids=stop_ids)
