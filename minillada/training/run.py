"""Train for real: `train` runs the loop of `train.py`, and validates, saves, resumes, and goes back after a crash.

It yields one `RunStep` for each step of an optimiser; who prints, plots or samples loops over them.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from ..errors import BadInput, BadLuck
from ..model import LLaDA
from ..text.ids import Tokens
from ..text.tokenizer import Tokenizer
from ..train import TrainStep, Ways, learn
from .balance import Balanced
from .config import VERSION, RunConfig, TrainConfig, config_of
from .distributed import agree, clip_sharded, gathered, in_turn, mean_loss, processes, rank, together, unsharded
from .lora import merged
from .making import Made, finished, make
from .optim import restore, snapshot, weight_norm
from .runs import Run, load_state, refuse_occupied, rng_state, set_rng_state

PATIENCE = 3  # times that a training goes back to the same checkpoint


@dataclass(frozen=True, kw_only=True, eq=False)
class RunStep(TrainStep):
    """Tell what one optimiser step of a run did, and what the run has by then."""

    bound: float | None  # of held-out data, in steps that evaluate: nats per character; VRPO: its preference loss
    levels: list[tuple[float, float]] | None  # (t, nats per masked token) of the held-out text, when it evaluates
    best: int  # the step of the best bound so far, whose checkpoint is kept; 0 before the first
    tokens: int  # seen so far
    tokens_per_second: float  # since this program began, evaluation and saving included
    seconds: float  # of training, interruptions not counted
    precision: str
    model: LLaDA
    tokenizer: Tokenizer
    text: Tokens
    length: int  # tokens of the longest row
    config: RunConfig
    notices: tuple[str, ...]  # lines that a user should see, once

    def record(self) -> dict:
        """Return what the log holds of this step."""
        return {
            "step": self.step, "loss": self.loss, self.config.held_out: self.bound, "lr": self.lr,
            "grad_norm": self.grad_norm, "tokens": self.tokens, "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds, "levels": self.levels, "best": self.best, "precision": self.precision,
            "characters_per_token": self.text.characters_per_token, **self.numbers,
        } | ({"notices": self.notices} if self.notices else {})  # fmt: skip


# ---- saving, and going back


def fingerprint(document: dict) -> str:
    """Return a hash of what run.json holds."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def going_on(run: Run, moved: dict) -> tuple[RunConfig, dict]:
    """Return the config of a run that is resumed, with its fields that have moved, and the state of its newest
    checkpoint. Raises BadInput for a run.json that was edited, or a field that it does not have."""
    with together():
        config, saved = config_of(run.config), load_state(run.newest)
        if saved.get("version") != VERSION or saved.get("config") != fingerprint(run.config):
            what = f"run.json: expected what the run in {run.directory} began with, got an edited one"
            raise BadInput(f"{what}; undo its changes, or begin another run")
        if others := moved.keys() - {field.name for field in fields(config)}:
            what = f"resume: expected changes of {type(config).__name__}'s fields, got {min(others)!r}"
            raise BadInput(f"{what}; leave it out")
        return replace(config, **moved), saved


class Rescue:
    """Remember the weights and optimisers of the last checkpoint, to go back to when a step is not finite."""

    def __init__(self, trained: nn.Module, optimizers: list[Optimizer], undone: int = 0) -> None:
        self.trained, self.optimizers = trained, optimizers
        self.good, self.undone = snapshot(trained, optimizers), undone

    def remember(self) -> None:
        """Take the present weights as those to go back to."""
        self.good, self.undone = snapshot(self.trained, self.optimizers), 0

    def go_back(self, step: int, found: str) -> str:
        """Put the weights back, at a quarter of the present learning rate; return a line about it for the user. The
        data go on, and so do the steps. Raises BadLuck if that was of no use three times."""
        if self.undone == PATIENCE:
            what = f"loss: expected a finite one, got {found} in step {step}, after going back {PATIENCE} times"
            raise BadLuck(f"{what}; lower lr, or look at the data")
        groups = lambda: [group for optimizer in self.optimizers for group in optimizer.param_groups]
        rates = [group["initial_lr"] / 4 for group in groups()]
        restore(self.trained, self.optimizers, self.good)
        for group, rate in zip(groups(), rates, strict=True):
            group["initial_lr"] = rate
        self.undone += 1
        return f"step {step}: {found}; back to the last checkpoint, at a quarter of the learning rate"


def begin_run(made: Made) -> Run:
    """Create the run directory, with a run.json that says all of the config and of what kind it is."""
    document = {"version": VERSION, "objective": made.config.objective, **asdict(made.config)}
    with together():
        return Run.create(made.config.out, json.loads(json.dumps(document)), rank() == 0)


def write(run: Run, made: Made, step: RunStep, saving: bool, best: tuple[float, int], undone: int) -> None:
    """Add a step to the log. If saving, write its checkpoint: the model, merged if it has adapters, and all that
    resuming exactly needs."""
    lora, state, whole = made.trained is not made.model, {}, None
    if saving:
        whole = merged(made.model) if lora else unsharded(made.model)
        state = {
            "version": VERSION, "config": fingerprint(run.config), "text": made.text.fingerprint, "base": made.base,
            "step": step.step, "seconds": step.seconds, "best": best, "undone": undone,
            "optimizers": gathered([optimizer.state_dict() for optimizer in made.optimizers]),
            "rng": rng_state(data=made.rng), "adapters": made.trained.state_dict() if lora else {},
        }  # fmt: skip
    with together():
        run.log(step.record())
        if saving:
            run.save(step.step, whole, made.saves, state, made.config.keep, step.best)


# ---- the run


def train(
    config: RunConfig | None = None,
    resume: str | Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    **moved: object,
) -> Iterator[RunStep]:
    """Train, yielding every step. With `config.out` a log and checkpoints are written there; `resume` goes on with such
    a run, bit for bit if it counts in steps; `moved` are fields of its config that may differ by now: device, shard.
    When `stop()` answers True after a step, that step is saved and is the last. Raises BadInput and BadLuck.

    A loss, gradient or weight that is not finite undoes all steps since the last checkpoint: training goes on with the
    next batch, from that checkpoint's weights, at a quarter of the learning rate.
    """
    with ExitStack() as stack:
        stack.enter_context(processes())
        run, config, saved = None, config or TrainConfig(), {}
        if resume is not None:
            run = stack.enter_context(in_turn(lambda: Run.resume(resume, rank() == 0, config_of)))
            config, saved = going_on(run, moved)
        elif config.out:
            with together():
                refuse_occupied(Path(config.out))  # before data are read
        made = make(config, run and run.newest, saved)
        if run is None and config.out:
            run = stack.enter_context(begin_run(made))
        yield from follow(made, run, saved, stop)


def follow(made: Made, run: Run | None, saved: dict, stop: Callable[[], bool]) -> Iterator[RunStep]:
    """Yield every step of `learn`; validate, go back, log and save between them."""
    config, objective, start = made.config, made.objective, time.perf_counter()
    first, seconds, best = saved.get("step", 0), saved.get("seconds", 0.0), saved.get("best", (math.inf, 0))
    before, notices = seconds, [*made.notices, *(run.notices if run else [])]
    rescue = Rescue(made.trained, made.optimizers, saved.get("undone", 0))
    if saved:
        set_rng_state(saved["rng"], data=made.rng)
    by_clock = (lambda step: seconds / 60 / config.minutes) if config.minutes else None
    ways = Ways(by_clock, clip_sharded, mean_loss)
    for done in learn(made.called, made.optimizers, objective, config, made.rng, first, ways):
        step, sound = done.step, math.isfinite(done.loss + done.grad_norm)
        if sound and isinstance(objective, Balanced):
            objective.move_biases()
        seconds, stopped = agree(before + time.perf_counter() - start, stop())
        last = stopped > 0 or finished(config, step, seconds)
        evaluate, saving = last or step % config.eval_every == 0, last or step % config.checkpoint_every == 0
        if not (sound := sound and (not (evaluate or saving) or math.isfinite(weight_norm(made.model)))):
            notices.append(rescue.go_back(step, f"loss {done.loss:.3g}, gradient {done.grad_norm:.3g}"))
        found = objective.validate(made.model) if evaluate else {}
        bound = found.get(config.held_out)
        if bound is not None and bound < best[0]:
            best, saving = (bound, step), True
        if saving and sound:
            rescue.remember()
        tokens = config.batch_size * made.length
        yielded = RunStep(
            step=step, loss=done.loss, grad_norm=done.grad_norm, lr=done.lr, numbers=done.numbers, bound=bound,
            levels=found.get("levels"), best=best[1], tokens=step * tokens, seconds=seconds,
            tokens_per_second=(step - first) * tokens / (time.perf_counter() - start), precision=config.precision,
            model=made.model, tokenizer=made.tokenizer, text=made.text, length=made.length, config=config,
            notices=tuple(notices),
        )  # fmt: skip
        if run:
            write(run, made, yielded, saving, best, rescue.undone)
        notices = []
        yield yielded
        if last:
            return
