"""Train for real: `train` runs the loop of `train.py`, and validates, saves, resumes, and goes back after a crash. It
yields one `RunStep` for each step of an optimiser; who prints, plots or samples loops over them."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.optim import Optimizer

from ..errors import BadInput, BadLuck
from ..files import expect, listed, one_line
from ..model import LLaDA
from ..text.ids import Tokens
from ..text.tokenizer import Tokenizer
from ..train import TrainStep, Ways, learn
from .balance import Balanced, move_biases
from .config import VERSION, RunConfig, TrainConfig, config_of
from .distributed import agree, full, in_turn, optimizer_state, processes, rank, reduce, together, unsharded, world_size
from .lora import merged
from .making import Made, finished, make
from .optim import restore, snapshot
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
    model: LLaDA
    tokenizer: Tokenizer
    text: Tokens
    length: int  # tokens of the longest row
    config: RunConfig
    notices: tuple[str, ...]  # lines that a user should see, once

    def record(self) -> dict:
        """Return what the log holds of this step."""
        names = ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds", "levels", "best")
        told = {name: getattr(self, name) for name in names} | {self.config.held_out: self.bound} | self.numbers
        about = {"precision": self.config.precision, "characters_per_token": self.text.characters_per_token}
        return told | about | ({"notices": self.notices} if self.notices else {})


def fingerprint(document: dict) -> str:
    """Return a hash of what run.json holds."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


KEPT = {"model", "preset", "tokenizer", "length", "rows", "lora", "out"}  # fields that checkpoints are made of
NUMBERS = (int, float)
STATE = {  # what the state of a checkpoint holds at least, and the types of its values
    "version": int, "config": (dict, str), "text": str, "base": (str, type(None)), "step": int, "seconds": NUMBERS,
    "best": (list, type(None)), "undone": int, "rates": list, "rng.python": list, "rng.numpy": list,
    "rng.torch": Tensor, "rng.data": Tensor,
}  # fmt: skip


def going_on(run: Run, moved: dict) -> tuple[RunConfig, dict]:
    """Return the config of a run that is resumed, with its fields that have moved, and the state of its newest
    checkpoint. Raises BadInput for a run.json that was edited in other fields, and for a field that cannot move."""
    with together():
        config, saved = config_of(run.config), load_state(run.newest)
        for name, kind in STATE.items():
            expect(name in saved and isinstance(saved[name], kind), f"{name} in state.json", "what this version saves",
                   saved.get(name, "none"), "resume with the minillada that began the run")  # fmt: skip
        expect(saved["version"] == VERSION, "state.json", f"version {VERSION}", saved["version"],
               "resume with the minillada that began the run")  # fmt: skip
        if others := moved.keys() - {field.name for field in fields(config)}:
            what = f"resume: expected changes of {type(config).__name__}'s fields, got {min(others)!r}"
            raise BadInput(f"{what}; leave it out")
        if kept := moved.keys() & KEPT:
            what = f"resume: expected no other {min(kept)} than the run began with, got {moved[min(kept)]!r}"
            raise BadInput(f"{what}; leave it out, or begin another run")
        if edits := edited(saved["config"], run.config) - moved.keys():
            what = f"run.json: expected what the run in {run.directory} began with, got an edited one"
            named = f"allow it by name, as --{min(edits).replace('_', '-')}"
            raise BadInput(f"{what}; undo the change of {listed(sorted(edits))}, or {named}")
        if {"lr", "adam_lr"} & moved.keys():
            del saved["rates"]  # then the config's hold
        return replace(config, **moved), saved


def edited(began: dict | str, document: dict) -> set[str]:
    """Return the names of run.json's fields that are not as the run began with; of older runs, which saved a hash of
    them all, every name if the hash differs."""
    if isinstance(began, str):
        return set() if began == fingerprint(document) else set(document)
    return {name for name in began.keys() | document.keys() if (name, began.get(name)) not in document.items()}


class Rescue:
    """Remember the weights and optimisers of the last checkpoint, to go back to when a step is not finite."""

    def __init__(self, trained: nn.Module, optimizers: list[Optimizer], undone: int = 0) -> None:
        self.trained, self.optimizers = trained, optimizers
        self.remember()
        self.undone = undone  # times that training went back to these weights

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


def write(run: Run, made: Made, step: RunStep, saving: bool, best: tuple[float, int], undone: int) -> None:
    """Add a step to the log; if saving, write its checkpoint: the model, adapters merged, and what resuming needs."""
    lora, state, whole = made.trained is not made.model, {}, None
    if saving:
        whole = merged(made.model) if lora else unsharded(made.model)
        state = {
            "version": VERSION, "config": run.config, "text": made.text.fingerprint, "base": made.base,
            "step": step.step, "seconds": step.seconds, "best": best if best[1] else None, "undone": undone,
            **optimizer_state(made.optimizers), **rng_state(data=made.rng),
            **{f"adapters.{name}": tensor for name, tensor in made.trained.state_dict().items() if lora},
            **{f"average.{name}": tensor for name, tensor in (made.average or nn.Module()).state_dict().items()},
        }  # fmt: skip
    with together():
        run.log(step.record())
        if saving:
            run.save(step.step, whole, made.saves, state, made.config.keep, step.best, made.guide)


def train(
    config: RunConfig | None = None, resume: str | Path | None = None, stop: Callable[[], bool] = lambda: False,
    **moved: object,
) -> Iterator[RunStep]:  # fmt: skip
    """Yield every step of a training. With `config.out` a log and checkpoints are written there; `resume` goes on with
    such a run, bit for bit if it counts in steps; `moved` are fields of its config that are to differ now, as device.
    A step after which `stop()` is True is saved and is the last. A loss, gradient or weight that is not finite undoes
    all steps since the last checkpoint; the next batch goes on there, at a quarter of lr. Raises BadInput, BadLuck."""
    with ExitStack() as stack:
        stack.enter_context(processes())
        run, config, saved = None, config or TrainConfig(), {}
        if resume is not None:
            run = stack.enter_context(in_turn(lambda: Run.open(resume, rank() == 0, config_of)))
            config, saved = going_on(run, moved)
        elif config.out:
            with together():
                refuse_occupied(Path(config.out))  # before data are read
        made = make(config, run and run.newest, saved)
        if run is not None:
            with together():
                with one_line("state.json: expected what a training saves", "use another checkpoint", Exception):
                    set_rng_state(saved, data=made.rng)
                run.tidy()  # what could be refused has been: from here on the directory changes
        elif config.out:
            document = {"version": VERSION, "objective": config.objective, **asdict(made.config)}
            with together():
                run = stack.enter_context(Run.create(config.out, json.loads(json.dumps(document)), rank() == 0))
        yield from follow(made, run, saved, stop)


def follow(made: Made, run: Run | None, saved: dict, stop: Callable[[], bool]) -> Iterator[RunStep]:
    """Yield every step of `learn`; validate, go back, log and save between them."""
    config, objective, start = made.config, made.objective, time.perf_counter()
    first, seconds, best = saved.get("step", 0), saved.get("seconds", 0.0), saved.get("best") or (math.inf, 0)
    before, notices = seconds, [*made.notices, *(run.notices if run else [])]
    rescue = Rescue(made.trained, made.optimizers, saved.get("undone", 0))
    length = config.length if isinstance(config, TrainConfig) else made.text.longest
    inner, stopped = getattr(config, "inner", 1), 0  # steps that learn from one rollout
    clip = lambda parameters, largest: full(nn.utils.clip_grad_norm_(parameters, largest))
    norm = lambda: full(nn.utils.get_total_norm([p.detach() for p in made.model.parameters()])).item()  # of all weights
    mean = lambda loss: reduce(loss / world_size(), ReduceOp.SUM).item()
    ways = Ways((lambda step: seconds / 60 / config.minutes) if config.minutes else None, clip, mean)
    for done in learn(made.called, made.optimizers, objective, config, made.rng, first, ways):
        step, sound = done.step, math.isfinite(done.loss + done.grad_norm)
        if sound and isinstance(objective, Balanced) and getattr(config, "bias_rate", 0):
            move_biases(objective.routings, config.bias_rate)
        seconds, stopped = agree(before + time.perf_counter() - start, stopped or stop())
        whole = step % inner == 0  # a rollout is not saved, so a run must go on with a new one
        last = step == config.steps or (whole and (stopped > 0 or finished(config, step, seconds)))
        due = lambda every: last or (whole and step % every < inner)  # noqa: B023 called in this very step
        evaluate, saving = due(config.eval_every), due(config.checkpoint_every)
        if not (sound := sound and (not (evaluate or saving) or math.isfinite(norm()))):
            notices.append(rescue.go_back(step, f"loss {done.loss:.3g}, gradient {done.grad_norm:.3g}"))
        found = objective.validate(made.model) if evaluate else {}
        bound = found.get(config.held_out)
        if bound is not None and bound < best[0]:
            best, saving = (bound, step), True
        if saving and sound:
            rescue.remember()
        tokens = config.batch_size * length
        yielded = RunStep(
            **vars(done), bound=bound, levels=found.get("levels"), best=best[1], tokens=step * tokens, seconds=seconds,
            tokens_per_second=(step - first) * tokens / (time.perf_counter() - start), model=made.model, text=made.text,
            tokenizer=getattr(made.saves, "tokenizer", made.saves), length=length, config=config, notices=(*notices,),
        )  # fmt: skip
        if run:
            write(run, made, yielded, saving, best, rescue.undone)
        notices = []
        yield yielded
        if last:
            return
