"""Train a mask predictor: hide tokens, predict them, take a step down the gradient (LLaDA, arXiv:2502.09992).

    objective = Pretraining(lambda start: batches(ids, 8, 64, seed=0, start=start), held_out, model.config.mask_id)
    for done in learn(model, [torch.optim.AdamW(model.parameters())], objective, LearnConfig(steps=300), rng):
        print(done.step, done.loss)

`learn` is the loop and an `Objective` says what is learned. `training/run.py` saves and resumes around this same loop.

Shapes: B batch, T sequence, n held-out windows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from .diffusion import Noised, exact_count, model_bound, pretraining_loss, random_length, sample_t


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """Hold how long a training is, the course of its learning rate, and where gradients are cut off."""

    steps: int | None = None  # None: until the caller stops, for which `Ways.progress` is needed
    warmup: float = 0.02  # share of the training over which the rate rises
    decay: float = 0.4  # share over which it falls to zero at the end
    clip: float = 1.0  # the gradient's largest norm


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """Tell what one optimiser step did."""

    step: int  # from 1
    loss: float
    grad_norm: float  # before clipping
    lr: float  # of the first group of parameters
    numbers: dict  # what the objective has to tell of this batch


class Objective(Protocol):
    """Say what is learned."""

    numbers: dict  # what the last batch has to tell a log; {} if nothing
    progress: float  # of the training, from 0 to 1; `learn` sets it before the losses of a batch

    def batches(self, start: int) -> Iterator[Any]: ...  # from number start on; number n depends on seed and n alone
    def losses(self, model: nn.Module, batch: Any, rng: Generator) -> Iterator[Tensor]: ...  # scalars; their sum counts
    def validate(self, model: nn.Module) -> dict: ...  # figures of held-out data


class Pretraining:
    """Predict the hidden tokens of a text: the objective of LLaDA's pre-training (eq. 3)."""

    def __init__(
        self, batches: Callable[[int], Iterator[Tensor]], held: Tensor, mask_id: int, process: Callable = exact_count
    ) -> None:
        """Take batches(start) -> x0 (B,T) for ever, held-out windows (n,T), and one of `diffusion.PROCESSES`."""
        self.batches, self.held, self.mask_id, self.process, self.numbers = batches, held, mask_id, process, {}

    def noise(self, x0: Tensor, rng: Generator) -> tuple[Tensor, Noised]:
        """Return x0 (B,T), one batch in a hundred cut to a random length, and its noise, at a level t for each row."""
        x0 = random_length(x0, rng)
        return x0, self.process(x0, self.mask_id, sample_t(len(x0), rng), rng)

    def losses(self, model: nn.Module, batch: Tensor, rng: Generator) -> Iterator[Tensor]:
        """Yield the bound in nats per token, averaged over rows: one part."""
        yield pretraining_loss(model, *self.noise(batch, rng))

    def held_noise(self) -> tuple[Tensor, Noised]:
        """Return each held-out window twice in a row, (2n,T), and noise for it that is always the same."""
        rng = Generator().manual_seed(0)
        pairs = [exact_count(row.expand(2, -1), self.mask_id, sample_t(2, rng), rng) for row in self.held]
        return self.held.repeat_interleave(2, dim=0), Noised(*map(torch.cat, zip(*pairs, strict=True)))

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict:
        """Return {"bound": the upper bound of -log p of the held-out windows, in nats per token}."""
        x0, noised = self.held_noise()
        parts = zip(x0.split(32), *(x.split(32) for x in noised), strict=True)
        return {"bound": sum(model_bound(model, x, Noised(*n)).sum().item() for x, *n in parts) / x0.numel()}


def rate(progress: float, config: LearnConfig) -> float:
    """Return the share of the full learning rate at a progress from 0 to 1: it warms up, stays, and decays.

    With warmup 0.1 and decay 0.5: 0.05 -> 0.5, 0.3 -> 1.0, 0.75 -> 0.5.
    """
    return min(1.0, progress / config.warmup if config.warmup else 1.0, (1 - progress) / max(config.decay, 1e-9))


class Ways(NamedTuple):
    """Hold what `learn` does otherwise in a run by the clock, with sharded weights, or in several processes."""

    progress: Callable[[int], float] | None = None  # of a step, from 0 to 1; None: step / (steps + 1)
    clip: Callable[..., Tensor] = nn.utils.clip_grad_norm_  # of gradients; returns the norm that they had
    mean: Callable[[Tensor], float] = Tensor.item  # of the loss, over processes


def learn(
    model: nn.Module, optimizers: Sequence[Optimizer], objective: Objective, config: LearnConfig, rng: Generator,
    start: int = 0, ways: Ways = Ways(),  # noqa: B008 (it cannot change)
) -> Iterator[TrainStep]:  # fmt: skip
    """Yield each optimiser step, from number start + 1 on. model is what is called: compiled or wrapped, if need be. A
    step whose loss or gradient is not finite changes nothing. Between two steps the caller may do as it likes:
    validate, save, put weights back, or lower a group's "initial_lr", which is its full rate."""
    progress = ways.progress or (lambda step: step / (config.steps + 1))
    for step, batch in enumerate(objective.batches(start), start + 1):
        objective.progress = progress(step)
        share = rate(objective.progress, config)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * share
        total = torch.zeros(())
        for part in objective.losses(model, batch, rng):
            part.backward()  # the gradients of several parts add up
            total = total + part.detach().cpu()
        loss, grad_norm = ways.mean(total), ways.clip(model.parameters(), config.clip).item()
        for optimizer in optimizers:
            if math.isfinite(loss + grad_norm):
                optimizer.step()
            optimizer.zero_grad()
        lr = optimizers[0].param_groups[0]["lr"]
        yield TrainStep(step=step, loss=loss, grad_norm=grad_norm, lr=lr, numbers=objective.numbers)
        if step == config.steps:
            return
