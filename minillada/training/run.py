"""The training loop. `train` yields one `TrainStep` per optimiser step; who prints, plots or samples loops over it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from ..diffusion import PROCESSES, Noised, random_length, sample_t
from ..model import LLaDA
from ..text.ids import Tokens, batches
from ..text.tokenizer import Tokenizer
from .balance import move_biases, routing_report
from .config import TrainConfig
from .distributed import agree, full, processes
from .optim import add_gradients, set_rate, weight_norm
from .state import State
from .validation import validate


class TrainStep(NamedTuple):
    """What one optimiser step did."""

    step: int  # from 1
    loss: float  # nats per token of this batch: one sample of the upper bound of -log p; in VRPO, its own loss
    bound: float | None  # nats per character of the validation text, in the steps that evaluate
    lr: float
    grad_norm: float
    tokens: int  # seen so far
    tokens_per_second: float  # since this program began, evaluation and saving included
    seconds: float  # of training, interruptions not counted
    levels: list[tuple[float, float]] | None  # (t, nats per masked token) of the validation text, when it evaluates
    best: int  # the step of the best bound so far, whose checkpoint is kept; 0 before the first
    precision: str
    model: LLaDA
    extra: dict  # what experts (`routing_report`) and VRPO add to the log
    tokenizer: Tokenizer
    text: Tokens
    config: TrainConfig
    notices: tuple[str, ...]  # lines that a user should see, once

    def record(self) -> dict:
        """What the log holds of it."""
        numbers = dict(zip(self._fields[: self._fields.index("model")], self, strict=False))
        about = {"characters_per_token": self.text.characters_per_token}
        return numbers | about | self.extra | ({"notices": self.notices} if self.notices else {})


class Pretraining:
    """What is asked of a text: batches, their noise, a validation. `SFT` and `VRPO` have the same three."""

    validate = staticmethod(validate)

    def __init__(self, text: Tokens, config: TrainConfig, mask_id: int) -> None:
        self.text, self.config, self.mask_id = text, config, mask_id

    def batches(self, start: int) -> Iterator[Tensor]:
        """x0 (B,T) for ever, from batch number `start`."""
        return batches(self.text.train, self.config.batch_size, self.config.length, self.config.seed, start)

    def noise(self, model: nn.Module, x0: Tensor, precision: str, rng: Generator) -> tuple[Tensor, Noised, dict]:
        x0 = random_length(x0, rng)
        return x0, PROCESSES[self.config.process](x0, self.mask_id, sample_t(len(x0), rng), rng), {}


def update(
    model: nn.Module, optimizers: list[Optimizer], x0: Tensor, noised: Noised, config: TrainConfig, precision: str
) -> tuple[float, float, dict]:
    """One optimiser step on x0 (B,T): the loss in nats per token, the gradient's norm before clipping, and the routing.

    Where either is not finite, nothing is changed.
    """
    loss, routings = add_gradients(model, x0, noised, config, precision)
    grad_norm = full(nn.utils.clip_grad_norm_(model.parameters(), config.clip)).item()
    for optimizer in optimizers:
        if math.isfinite(loss + grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if config.bias_rate and math.isfinite(loss + grad_norm):
        move_biases(routings, config.bias_rate)
    return loss, grad_norm, routing_report(routings)


def train(
    config: TrainConfig | None = None,
    resume: str | Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    **moved: object,
) -> Iterator[TrainStep]:
    """Train, yielding every step. With `config.out` a log and checkpoints are written there; `resume` goes on with such
    a run, bit for bit if it counts in steps; `moved` are fields of its config that may differ by now: device, shard.
    When `stop()` answers True after a step, that step is saved and is the last. Raises BadInput and BadLuck.

    A loss, gradient or weight that is not finite undoes all steps since the last checkpoint: training goes on with the
    next batch, from that checkpoint's weights, at a quarter of the learning rate.
    """
    with ExitStack() as stack:
        stack.enter_context(processes())
        now = State(stack, config or TrainConfig(), resume, moved)
        config, model, text, rng = now.config, now.model, now.text, now.rng
        lesson = now.lesson or Pretraining(text, config, model.config.mask_id)
        first, before, start = now.step, now.seconds, time.perf_counter()
        seconds, per_step = before, config.batch_size * config.length
        for step, batch in enumerate(lesson.batches(first), first + 1):
            progress = seconds / 60 / config.minutes if config.minutes else step / (config.steps + 1)
            lr = set_rate(now.optimizers, config, progress, now.slower)
            x0, noised, extra = lesson.noise(model, batch, now.precision, rng)
            loss, grad_norm, routing = update(now.called, now.optimizers, x0, noised, config, now.precision)
            loss, extra = extra.pop("loss", loss), routing | extra
            seconds, stopped = agree(before + time.perf_counter() - start, stop())
            last = stopped > 0 or (seconds >= 60 * config.minutes if config.minutes else step >= config.steps)
            evaluate, save = last or step % config.eval_every == 0, last or step % config.checkpoint_every == 0

            size = loss + grad_norm + (weight_norm(model) if evaluate or save else 0.0)
            if not (sound := math.isfinite(size)):
                now.go_back(step, f"loss {loss:.3g}, gradient {grad_norm:.3g}")
            bound, levels = lesson.validate(model, text, config, now.precision) if evaluate else (None, None)
            if evaluate and bound < now.best[0]:
                now.best, save = (bound, step), True
            if save and sound:
                now.keep()

            speed = (step - first) * per_step / (time.perf_counter() - start)
            numbers = (step, loss, bound, lr, grad_norm, step * per_step, speed, seconds, levels, now.best[1])
            done = TrainStep(*numbers, now.precision, model, extra, now.tokenizer, text, config, tuple(now.notices))
            now.write(done.record(), save)
            now.notices = []
            yield done
            if last:
                return
