"""Few-step distillation: learn to reach in a few large steps what a frozen model reaches in many small ones.

    path   the frozen model fills the holes behind a prompt greedily, one token a step
    state  a random step of the path: all that was written at this step or later are holes again
    jump   the mean of -log p(token where the path ends | state) over a row's holes, averaged over rows

A path holds one of several right answers, so its tokens fit together, and a student that jumps to them can write many
at once. Two terms on the same states are options: `certainty_loss`, as in dParallel (arXiv:2509.26488), and
`consistency_loss` with a moving average (EMA) of the student, a step nearer to the end of the path.
Shapes: B rows, T sequence, N holes of the batch, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..diffusion import Noised, nll_bound, sample_t
from ..errors import BadInput
from ..measure.blocks import Beside, attention
from ..model import ModelConfig
from ..sampler import Canvas, SampleConfig, stream
from .config import DistilConfig
from .distributed import shares
from .optim import evaluation
from .sft import PADDING, Items, visits

GROUP = 64  # prompts that are answered together, always the same: so a path is the same after a resume
SHARPER = 0.5  # the temperature at which certainty is measured, dParallel's


class Path(NamedTuple):
    """Hold where paths end, and when each token was written."""

    x: Tensor  # (B,T) long; PADDING in front of shorter prompts
    written: Tensor  # (B,T) long: the number of the step, from 0; -1 for prompts and padding


def walk(model: nn.Module, prompts: Sequence[list[int]], gen_len: int) -> Path:
    """Let a model write gen_len tokens behind each prompt, greedily, one a step; return its paths."""
    c, device = model.config, next(model.parameters()).device
    canvas = Canvas.continuation(prompts, gen_len, c, device)
    written = torch.full_like(canvas.x, -1)
    how = {"cache": "block" if c.block else "none", "stop_at_eos": False}
    for step in stream(model, canvas, SampleConfig(gen_len=gen_len, steps=gen_len, block_len=gen_len, **how)):
        written = written.masked_fill(step.committed, step.step)
    return Path(step.x.masked_fill(~canvas.valid, PADDING), written)


def state(path: Path, t: Tensor, mask_id: int) -> Noised:
    """Return the states of paths in which ceil(t L) of the L written tokens are to come, t (B,) in (0,1]. The weight
    makes a row's bound T times the mean over its holes.

    Tokens written at steps 1, 0, 2 and t = 0.5: the first and the last are holes.
    """
    length = (path.written >= 0).sum(1)
    count = (t.double() * length).ceil().long()
    hidden = (-path.written).argsort(1).argsort(1) < count[:, None]  # the ones written last
    return Noised(path.x.masked_fill(hidden, mask_id), hidden, path.x.shape[1] / count)


def predict(model: nn.Module, x: Tensor, noised: Noised, block: int = 0) -> Tensor:
    """Return the logits of the holes, (N,V), with padding hidden from attention; a block model has the path's own
    tokens in the blocks before, as while it writes."""
    seen = Beside(model, x.clamp(min=0), block) if block else model
    where = noised.masked.nonzero(as_tuple=True)
    return seen(noised.xt.clamp(min=0), attn_mask=attention(x != PADDING), where=where).float()


def jump_loss(logits: Tensor, x: Tensor, noised: Noised) -> Tensor:
    """Return the mean cross-entropy of a row's holes with where the path ends, averaged over rows, in nats."""
    return nll_bound(logits, x.clamp(min=0), noised).mean() / x.shape[1]


def over_holes(values: Tensor, noised: Noised) -> Tensor:
    """Average values of holes (N,) over a row's holes, then over rows."""
    row = noised.masked.nonzero(as_tuple=True)[0]
    return (values * noised.weight[row]).sum() / noised.masked.numel()


def certainty_loss(logits: Tensor, x: Tensor, noised: Noised) -> Tensor:
    """Return the mean entropy of the predictions that are right already, in nats: where the likeliest token is the
    path's. Those that are wrong count 0 and have no gradient."""
    log_p = (logits / SHARPER).log_softmax(-1)
    right = logits.argmax(-1) == x[noised.masked]
    return over_holes(torch.where(right, -(log_p.exp() * log_p).sum(-1), 0.0), noised)


def consistency_loss(logits: Tensor, theirs: Tensor, noised: Noised) -> Tensor:
    """Return the mean of KL(theirs || ours) in nats, from two models' logits (N,V) for the same holes."""
    p = theirs.log_softmax(-1)
    return over_holes((p.exp() * (p - logits.log_softmax(-1))).sum(-1), noised)


class Distil:
    """Jump to where the paths of `teacher`, a frozen model, end. average: a copy of the model as it began or, of a run
    that goes on, as it was saved; it follows the model if the config asks for consistency."""

    def __init__(
        self, items: Items, config: DistilConfig, c: ModelConfig, teacher: nn.Module, average: nn.Module | None = None
    ) -> None:
        learned, held = ([pair for item in part for pair in item] for part in (items.learned, items.held))
        self.prompts, self.tests = [prompt for prompt, _ in learned], [prompt for prompt, _ in held][:128]
        self.gen_len = max(len(answer) for _, answer in learned + held)
        if (longest := max(len(prompt) for prompt, _ in learned + held) + self.gen_len) > c.max_len:
            what = f"data: expected at most {c.max_len} tokens of the longest prompt and answer together"
            raise BadInput(f"{what}, got {longest}; shorten either")
        self.config, self.c, self.teacher, self.average = config, c, teacher, average
        self.groups: dict[int, Path] = {}  # number -> the paths of GROUP prompts, written when one is first asked for
        self.numbers: dict = {}
        self.held: list[tuple[Path, Noised]] = []

    def batches(self, start: int) -> Iterator[list[int]]:
        """Yield batches of prompts by their numbers for ever, from batch `start`."""
        found = visits(len(self.prompts), self.config.seed, start * self.config.batch_size)
        while True:
            yield [number for number, _ in islice(found, self.config.batch_size)]

    def walk(self, prompts: Sequence[list[int]]) -> Path:
        with evaluation(self.config):
            return walk(self.teacher, prompts, self.gen_len)

    def path(self, numbers: Sequence[int]) -> Path:
        """Return the paths of these prompts."""
        for n in {number // GROUP for number in numbers} - self.groups.keys():
            self.groups[n] = self.walk(self.prompts[n * GROUP : (n + 1) * GROUP])
        found = [[part[n % GROUP].flip(0) for part in self.groups[n // GROUP]] for n in numbers]
        x, written = zip(*found, strict=True)  # from right to left, as padding is in front
        return Path(pad_sequence(x, True, PADDING).flip(1), pad_sequence(written, True, -1).flip(1))

    def predict(self, model: nn.Module, path: Path, noised: Noised) -> Tensor:
        with evaluation(self.config):
            return predict(model, path.x, noised, self.c.block)

    def losses(self, model: nn.Module, batch: list[int], rng: Generator) -> Iterator[Tensor]:
        """Yield this process's parts of the loss; then set `numbers`: the share of holes where the likeliest token is
        the path's."""
        t, nearer = sample_t(len(batch), rng), torch.rand(len(batch), generator=rng)
        config, right, holes = self.config, 0, 0
        if self.average is not None:
            follow(self.average, model, config.ema)
        for rows in shares(model, len(batch), config.accumulate):
            path = self.path([batch[i] for i in rows])
            now = state(path, t[rows].to(config.device), self.c.mask_id)
            logits = self.predict(model, path, now)
            loss = jump_loss(logits, path.x, now)
            if config.certainty:
                loss = loss + config.certainty * certainty_loss(logits, path.x, now)
            if self.average is not None:
                then = state(path, (t * nearer)[rows].clamp(min=1e-6).to(config.device), self.c.mask_id)
                with torch.no_grad():
                    theirs = self.predict(self.average, path, then)
                ours = logits[then.masked[now.masked]]  # of the holes that are left
                loss = loss + config.consistency * consistency_loss(ours, theirs, then)
            right += (logits.argmax(-1) == path.x[now.masked]).sum().item()
            holes += len(logits)
            yield loss / config.accumulate
        self.numbers = {"agreement": right / holes}

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict:
        """Return the jump loss of held-out prompts, 128 at most, in states that are always the same."""
        prompts, size = self.tests, GROUP
        if not self.held:
            t = sample_t(len(prompts), Generator().manual_seed(0)).to(self.config.device)
            t = t[torch.randperm(len(t), generator=Generator().manual_seed(0))]
            for first in range(0, len(prompts), size):
                path = self.walk(prompts[first : first + size])
                self.held.append((path, state(path, t[first : first + size], self.c.mask_id)))
        parts = [jump_loss(self.predict(model, p, n), p.x, n).item() * len(p.x) for p, n in self.held]
        return {"jump_loss": sum(parts) / len(prompts)}


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, ema: float) -> None:
    """Move an average of weights towards a model's: ema of what it was stays."""
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.lerp_(theirs, 1 - ema)
