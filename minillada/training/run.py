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
from typing import NamedTuple

import torch
from torch import Generator, nn
from torch.optim import Optimizer

from ..errors import BadInput, BadLuck
from ..model import LLaDA, ModelConfig
from ..text.corpora import cache_dir, make_tokenizer
from ..text.ids import Tokens, tokenise
from ..text.tokenizer import Tokenizer
from ..train import Objective, TrainStep, Ways, learn
from ..weights.checkpoint import check, expect_tokenizer, load
from .balance import Balanced
from .config import VERSION, RunConfig, SFTConfig, TrainConfig, TunedConfig, VRPOConfig, config_of
from .distributed import (
    agree,
    check_same,
    check_share,
    clip_sharded,
    gathered,
    in_turn,
    load_optimizer,
    mean_loss,
    processes,
    rank,
    spread,
    together,
    unsharded,
)  # fmt: skip
from .lora import adapt, adapters, merged
from .optim import choose_precision, make_optimizers, recompute, restore, snapshot, weight_norm
from .pretraining import TextPretraining
from .runs import Run, load_state, refuse_occupied, rng_state, set_rng_state
from .sft import SFT, Items, Taught, dialogue, read_items, teach
from .vrpo import VRPO, compared

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


# ---- what a run is made of


class Made(NamedTuple):
    """Hold what a run learns with: made from its config, or read back from a checkpoint."""

    config: RunConfig  # with the precision that was chosen
    notices: list[str]  # lines for the user
    text: Tokens
    tokenizer: Tokenizer
    saves: Tokenizer | Taught  # what is saved beside the model
    base: str | None  # a hash of the model that the run began with, if that is needed to go on
    objective: Objective
    model: LLaDA
    called: nn.Module  # what is called in its place, in training
    trained: nn.Module  # what changes: the model or its adapters
    optimizers: list[Optimizer]
    rng: Generator  # of the noise

    @property
    def length(self) -> int:
        """Return the tokens of the longest row."""
        return self.config.length if isinstance(self.config, TrainConfig) else self.text.longest


def make_model(config: TrainConfig, tokenizer: Tokenizer, rng: Generator) -> LLaDA:
    """Return a new model with random weights."""
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    model = LLaDA(ModelConfig(vocab_size=tokenizer.vocab_size, max_len=config.length, **ids, **config.model))
    model.init_weights(rng)
    return model


def read_text(config: TrainConfig, newest: Path | None) -> tuple[Tokens, Tokenizer]:
    """Return the ids of a text and their tokenizer, which is made of the text or read from the newest checkpoint."""
    fresh = lambda: make_tokenizer(config.tokenizer, config.data)
    tokenizer = in_turn(lambda: Tokenizer.load(newest) if newest else fresh())
    return in_turn(lambda: tokenise(config.data, tokenizer, cache_dir() / "tokens", config.length)), tokenizer


def read_dialogues(config: TunedConfig, newest: Path | None) -> tuple[Items, Taught, str, str | None]:
    """Return the lines of a file as ids, the tokenizer with its template, the directory of the model to begin with, and
    a hash of that model if the run needs it for as long as it lasts: under adapters, or as a reference."""
    lasts = config.lora > 0 or isinstance(config, VRPOConfig)
    with together():
        found = check(newest if newest and not lasts else config.start)
        base = hashlib.sha256(repr((found.entries, found.hashes)).encode()).hexdigest() if lasts else None
        expect_tokenizer(found.directory, f"from {config.start}")
        tokenizer = Tokenizer.load(found.directory, {"mask": found.config.mask_id})
        taught = Taught(tokenizer, teach(found.directory, tokenizer))
    turns_of = compared if isinstance(config, VRPOConfig) else dialogue
    items = in_turn(lambda: read_items(config.data, taught.template, found.config, turns_of))
    return items, taught, config.start if newest else str(found.directory), base


def check_beginning(saved: dict, text: Tokens, base: str | None, config: RunConfig) -> None:
    """Raise BadInput unless a run goes on with the text and the model that it began with, and is not finished."""
    if saved["base"] != base:
        what = f"from: expected the model that this run began with, got another in {config.start}"
        raise BadInput(f"{what}; put that one there, or begin another run")
    if saved["text"] != text.fingerprint:
        what = f"data: expected the text this run began with, got another in {config.data}"
        raise BadInput(f"{what}; undo its changes, or begin another run")
    if finished(config, saved["step"], saved["seconds"]):
        what = f"resume: expected a run that is not finished, got {config.out} after all of its {saved['step']} steps"
        raise BadInput(f"{what}; begin another run")


def begin_model(config: RunConfig, tokenizer: Tokenizer, rng: Generator, newest: Path | None, saved: dict) -> LLaDA:
    """Return the model as it begins or goes on: a new one, that of `start`, or that with adapters."""
    if isinstance(config, TunedConfig) and config.lora:
        model = adapt(load(config.start)[0], config.lora, rng)
        if saved:
            adapters(model).load_state_dict(saved["adapters"])
        return model
    if newest is None and isinstance(config, TrainConfig):
        return make_model(config, tokenizer, rng)
    return load(newest or config.start, "cpu", torch.float32)[0]


def begin_objective(config: RunConfig, text: Tokens, c: ModelConfig) -> Objective:
    """Return what a config asks to learn."""
    if isinstance(config, TrainConfig):
        objective = TextPretraining(text, config, c.mask_id)
        return Balanced(objective, config, config.bias_rate) if c.n_expert else objective
    if isinstance(config, SFTConfig):
        objective = SFT(text, config, c)
    else:
        frozen = lambda: load(config.start, config.device, torch.float32)[0].requires_grad_(False)
        objective = VRPO(text, config, c.mask_id, None if config.lora else frozen())
    return Balanced(objective, config) if c.n_expert else objective


def make(config: RunConfig, newest: Path | None = None, saved: dict | None = None) -> Made:
    """Read the data and make all that a run learns with; or read it back from its newest checkpoint, with the state
    saved there. Writes nothing but caches. Raises BadInput and BadLuck."""
    saved, base, rng = saved or {}, None, Generator().manual_seed(config.seed)
    with together():
        check_share(config)
    precision, notices = choose_precision(config)
    if isinstance(config, TrainConfig):
        text, saves = read_text(config, newest)
        config = replace(config, precision=precision)
    else:
        text, saves, start, base = read_dialogues(config, newest)
        config = replace(config, precision=precision, start=start)
    tokenizer = saves.tokenizer if isinstance(saves, Taught) else saves
    check_same("data", text.fingerprint)
    with together():
        if saved:
            check_beginning(saved, text, base, config)
        model = begin_model(config, tokenizer, rng, newest, saved)
        objective = begin_objective(config, text, model.config)
    trained = adapters(model) if isinstance(config, TunedConfig) and config.lora else model
    called = spread(recompute(model) if config.recompute else model, config)
    optimizers = make_optimizers(model, config)
    for optimizer, state in zip(optimizers, saved.get("optimizers", ()), strict=False):
        load_optimizer(optimizer, state)
    return Made(config, notices, text, tokenizer, saves, base, objective, model, called, trained, optimizers, rng)


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


def finished(config: RunConfig, step: int, seconds: float) -> bool:
    """Return whether a run has done all its steps, or used up its minutes."""
    return step == config.steps or (config.minutes is not None and seconds >= 60 * config.minutes)


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
    config, objective, first, best = made.config, made.objective, saved.get("step", 0), saved.get("best", (math.inf, 0))
    notices, rescue = [*made.notices, *(run.notices if run else [])], Rescue(made.trained, made.optimizers)
    if saved:
        set_rng_state(saved["rng"], data=made.rng)
        rescue.undone = saved["undone"]
    seconds, began = saved.get("seconds", 0.0), time.perf_counter() - saved.get("seconds", 0.0)
    by_clock = (lambda step: seconds / 60 / config.minutes) if config.minutes else None
    ways, start = Ways(by_clock, clip_sharded, mean_loss), time.perf_counter()
    for done in learn(made.called, made.optimizers, objective, config, made.rng, first, ways):
        step, sound = done.step, math.isfinite(done.loss + done.grad_norm)
        if sound and isinstance(objective, Balanced):
            objective.move_biases()
        seconds, stopped = agree(time.perf_counter() - began, stop())
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
