"""A training at one moment: how it begins, is saved, goes on after an interruption, and goes back after a crash."""

import hashlib
import math
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Generator

from ..errors import BadInput, BadLuck
from ..model import LLaDA, ModelConfig
from ..text.corpora import cache_dir, make_tokenizer
from ..text.ids import tokenise
from ..text.tokenizer import Tokenizer
from ..weights.checkpoint import check, expect_tokenizer, load
from .config import TrainConfig
from .distributed import check_same, check_share, gathered, in_turn, load_optimizer, rank, spread, together, unsharded
from .lora import adapt, adapters, merged
from .optim import choose_precision, make_optimizers, recompute, restore, snapshot
from .runs import Run, load_state, rng_state, set_rng_state
from .sft import SFT, Taught, hide_padding, read_items, teach
from .vrpo import VRPO

PATIENCE = 3  # times that a training goes back to the same checkpoint
SAVED = ("step", "seconds", "precision", "best", "slower", "undone")  # beside tensors, generators and the text's hash


def make_model(config: TrainConfig, tokenizer: Tokenizer, rng: Generator) -> LLaDA:
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    model = LLaDA(ModelConfig(vocab_size=tokenizer.vocab_size, max_len=config.length, **ids, **config.model))
    model.init_weights(rng)
    return model


class State:
    """What a training step reads and changes. With several processes, each has one, and rank 0 alone writes."""

    step = 0  # the last one that was saved
    seconds = 0.0  # of training until then
    best: tuple[float, int] = (math.inf, 0)  # the best bound so far, and its step
    slower = 1.0  # what going back has made of the learning rate
    undone = 0  # times that training went back to the last checkpoint
    notices: list[str]  # lines that the user should see
    base: str | None = None  # of the files of the model that it began with, if they are needed to go on
    taught: Taught | None = None  # the tokenizer, with the template of those who learn to answer

    def __init__(self, stack: ExitStack, config: TrainConfig, resume: str | Path | None, moved: dict) -> None:
        """Begin with the config, or go on with the run `resume`; the run is closed with the stack."""
        leads, self.run = rank() == 0, None
        if resume is not None:
            run = self.run = stack.enter_context(in_turn(lambda: Run.resume(resume, leads)))
            config = replace(TrainConfig(**run.config), **moved)
        with together():
            check_share(config)
            saved = load_state(self.run.newest) if self.run else {}
        self.rng, self.lesson = Generator().manual_seed(config.seed), None
        if config.start:
            config = self.begin(config, saved)
        else:
            make = lambda: make_tokenizer(config.tokenizer, config.data)
            self.tokenizer = in_turn(lambda: Tokenizer.load(run.newest) if saved else make())
            self.text = in_turn(lambda: tokenise(config.data, self.tokenizer, cache_dir() / "tokens", config.length))
        self.config = config
        check_same("data", self.text.fingerprint)
        with together():
            if saved and saved["text"] != self.text.fingerprint:
                raise BadInput(f"data: expected the text this run began with, got another in {config.data}; restore it")
            if saved and (saved["seconds"] >= 60 * config.minutes if config.minutes else saved["step"] >= config.steps):
                what = "resume: expected a run that is not finished"
                raise BadInput(f"{what}, got {resume} after all of its {saved['step']} steps; begin another")
            if config.out and not saved:
                self.run = stack.enter_context(Run.create(config.out, asdict(config), leads))
            begun = self.make(saved)
        self.model = recompute(begun) if config.recompute else begun
        self.trained = adapters(begun) if config.lora else begun  # what going back puts back
        self.called = spread(self.model, config)  # in its place, in training
        self.optimizers = make_optimizers(self.model, config)
        if saved:
            self.resume(saved)
        else:
            self.precision, self.notices = choose_precision(self.called, self.tokenizer.mask_id, self.text, config)
        self.good = snapshot(self.trained, self.optimizers)

    def begin(self, config: TrainConfig, saved: dict) -> TrainConfig:
        """Read what SFT or VRPO needs, but for the model; the config, with the longest row for its length.

        Adapters and a reference need the model that the run began with for as long as it lasts.
        """
        lasting = config.lora > 0 or config.objective == "prefer"
        with together():
            found = check(config.start if lasting or not saved else self.run.newest)
            self.base = hashlib.sha256(repr((found.entries, found.hashes)).encode()).hexdigest() if lasting else None
            if saved and saved["base"] != self.base:
                raise BadInput(f"from: expected what this run began with, got another in {config.start}; restore it")
            expect_tokenizer(found.directory, f"from {config.start}")
            self.tokenizer = Tokenizer.load(found.directory, {"mask": found.config.mask_id})
            self.taught = Taught(self.tokenizer, teach(found.directory, self.tokenizer))
        lesson = {"sft": SFT, "prefer": VRPO}[config.objective]
        items = in_turn(lambda: read_items(config.data, self.taught.template, found.config, lesson.turns_of))
        config = replace(config, start=str(found.directory) if not saved else config.start, length=items.longest)
        self.lesson = lesson(items, config, found.config)
        self.text = self.lesson.items
        return config

    def make(self, saved: dict) -> LLaDA:
        """The model as it begins, or goes on."""
        config, newest = self.config, self.run.newest if saved else None
        if not config.start:
            return load(newest, "cpu", torch.float32)[0] if saved else make_model(config, self.tokenizer, self.rng)
        if config.lora:
            model = adapt(load(config.start)[0], config.lora, self.rng)
            if saved:
                adapters(model).load_state_dict(saved["adapters"])
        else:
            model, _ = load(newest or config.start, "cpu", torch.float32)
            if config.objective == "prefer":
                self.lesson.reference = load(config.start, config.device, torch.float32)[0].requires_grad_(False)
                self.lesson.reference.register_forward_pre_hook(hide_padding, with_kwargs=True)
        model.register_forward_pre_hook(hide_padding, with_kwargs=True)
        return model

    def resume(self, saved: dict) -> None:
        for optimizer, of in zip(self.optimizers, saved["optimizers"], strict=True):
            load_optimizer(optimizer, of)
        for name in SAVED:
            setattr(self, name, saved[name])
        set_rng_state(saved["rng"], data=self.rng)
        self.notices = self.run.notices

    def keep(self) -> None:
        """Take this as the state to go back to."""
        self.good, self.undone = snapshot(self.trained, self.optimizers), 0

    def go_back(self, step: int, found: str) -> None:
        """To the last checkpoint's weights, at a quarter of the learning rate; the data go on, and so do the steps.

        Raises BadLuck if that was of no use three times.
        """
        if self.undone == PATIENCE:
            what = f"loss: expected a finite one, got {found} in step {step}, after going back {PATIENCE} times"
            raise BadLuck(f"{what}; lower lr, or look at the data")
        restore(self.trained, self.optimizers, self.good)
        self.undone, self.slower = self.undone + 1, self.slower / 4
        self.notices.append(f"step {step}: {found}; back to the last checkpoint, at a quarter of the learning rate")

    def write(self, record: dict, save: bool) -> None:
        """Add a line to the run's log, if there is one, and save the checkpoint of the record's step if so asked."""
        if not self.run:
            return
        if save:
            whole, optimizers = unsharded(self.model), gathered([o.state_dict() for o in self.optimizers])
            whole = merged(whole) if self.config.lora else whole
        with together():
            self.run.log(record)
            if save:
                self.step, self.seconds = record["step"], record["seconds"]
                state = {"optimizers": optimizers, "rng": rng_state(data=self.rng), "text": self.text.fingerprint}
                state |= {name: getattr(self, name) for name in SAVED}
                state |= {"base": self.base, "adapters": adapters(self.model).state_dict()} if self.lesson else {}
                self.run.save(self.step, whole, self.taught or self.tokenizer, state, self.config.keep, self.best[1])
