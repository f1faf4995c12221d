"""A training at one moment: how it begins, is saved, goes on after an interruption, and goes back after a crash."""

import math
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Generator

from .checkpoint import load
from .data import cache_dir, make_tokenizer, tokenise
from .distributed import check_same, check_share, gathered, in_turn, load_optimizer, rank, spread, together, unsharded
from .errors import BadInput, BadLuck
from .model import LLaDA, ModelConfig
from .optim import choose_precision, make_optimizers, recompute, restore, snapshot
from .presets import TrainConfig
from .runs import Run, load_state, rng_state, set_rng_state
from .tokenizer import Tokenizer

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

    def __init__(self, stack: ExitStack, config: TrainConfig, resume: str | Path | None, moved: dict) -> None:
        """Begin with the config, or go on with the run `resume`; the run is closed with the stack."""
        leads, self.run = rank() == 0, None
        if resume is not None:
            run = self.run = stack.enter_context(in_turn(lambda: Run.resume(resume, leads)))
            config = replace(TrainConfig(**run.config), **moved)
        with together():
            check_share(config)
            saved = load_state(self.run.newest) if self.run else {}
        self.config, self.rng = config, Generator().manual_seed(config.seed)
        make = lambda: make_tokenizer(config.tokenizer, config.data)
        self.tokenizer = in_turn(lambda: Tokenizer.load(run.newest) if saved else make())
        self.text = in_turn(lambda: tokenise(config.data, self.tokenizer, cache_dir() / "tokens", config.length))
        check_same("data", self.text.fingerprint)
        with together():
            if saved and saved["text"] != self.text.fingerprint:
                raise BadInput(f"data: expected the text this run began with, got another in {config.data}; restore it")
            if config.out and not saved:
                self.run = stack.enter_context(Run.create(config.out, asdict(config), leads))
            begun = load(run.newest, "cpu", torch.float32)[0] if saved else make_model(config, self.tokenizer, self.rng)
        self.model = recompute(begun) if config.recompute else begun
        self.called = spread(self.model, config)  # in its place, in training
        self.optimizers = make_optimizers(self.model, config)
        if saved:
            self.resume(saved)
        else:
            self.precision, self.notices = choose_precision(self.called, self.tokenizer.mask_id, self.text, config)
        self.good = snapshot(self.model, self.optimizers)

    def resume(self, saved: dict) -> None:
        for optimizer, of in zip(self.optimizers, saved["optimizers"], strict=True):
            load_optimizer(optimizer, of)
        for name in SAVED:
            setattr(self, name, saved[name])
        set_rng_state(saved["rng"], data=self.rng)
        self.notices = self.run.notices

    def keep(self) -> None:
        """Take this as the state to go back to."""
        self.good, self.undone = snapshot(self.model, self.optimizers), 0

    def go_back(self, step: int, found: str) -> None:
        """To the last checkpoint's weights, at a quarter of the learning rate; the data go on, and so do the steps.

        Raises BadLuck if that was of no use three times.
        """
        if self.undone == PATIENCE:
            what = f"loss: expected a finite one, got {found} in step {step}, after going back {PATIENCE} times"
            raise BadLuck(f"{what}; lower lr, or look at the data")
        restore(self.model, self.optimizers, self.good)
        self.undone, self.slower = self.undone + 1, self.slower / 4
        self.notices.append(f"step {step}: {found}; back to the last checkpoint, at a quarter of the learning rate")

    def write(self, record: dict, save: bool) -> None:
        """Add a line to the run's log, if there is one, and save the checkpoint of the record's step if so asked."""
        if not self.run:
            return
        if save:
            whole, optimizers = unsharded(self.model), gathered([o.state_dict() for o in self.optimizers])
        with together():
            self.run.log(record)
            if save:
                self.step, self.seconds = record["step"], record["seconds"]
                state = {"optimizers": optimizers, "rng": rng_state(data=self.rng), "text": self.text.fingerprint}
                state |= {name: getattr(self, name) for name in SAVED}
                self.run.save(self.step, whole, self.tokenizer, state, self.config.keep, best=self.best[1])
