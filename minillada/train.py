"""The training loop. `train` yields one `TrainStep` per optimiser step; who prints, plots or samples loops over it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from .checkpoint import load
from .data import Tokens, batches, cache_dir, make_tokenizer, tokenise, validation_batch
from .diffusion import PROCESSES, pretraining_loss, random_length, sample_t
from .errors import BadInput, BadLuck
from .likelihood import log_likelihoods
from .model import LLaDA, ModelConfig
from .optim import autocast, choose_precision, make_optimizers, set_rate
from .presets import TrainConfig
from .runs import Run, load_state, rng_state, set_rng_state
from .tokenizer import Tokenizer


class TrainStep(NamedTuple):
    """What one optimiser step did."""

    step: int  # from 1
    loss: float  # nats per token of this batch: one sample of the upper bound of -log p
    bound: float | None  # nats per character of the validation text, in the steps that evaluate
    lr: float
    grad_norm: float
    tokens: int  # seen so far
    tokens_per_second: float  # since this program began, evaluation and saving included
    seconds: float  # of training, interruptions not counted
    model: LLaDA
    tokenizer: Tokenizer
    text: Tokens
    config: TrainConfig
    notices: tuple[str, ...]  # lines that a user should see, once


def make_model(config: TrainConfig, tokenizer: Tokenizer, rng: Generator) -> LLaDA:
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    model = LLaDA(ModelConfig(vocab_size=tokenizer.vocab_size, max_len=config.length, **ids, **config.model))
    model.init_weights(rng)
    return model.to(config.device)


def validation_bound(model: nn.Module, text: Tokens, config: TrainConfig, precision: str) -> float:
    """Upper bound of -log p of the validation text in nats per character: 128 windows, 2 masks each, always the same.

    Each window is predicted without what stands before it.
    """
    rows = validation_batch(text.val, 128, config.length).tolist()
    with autocast(config, precision):
        values, _ = log_likelihoods(model, [([], row) for row in rows], n_samples=2)
    return -values.mean().item() / config.length / text.characters_per_token


def update(
    model: LLaDA, optimizers: list[Optimizer], x0: Tensor, config: TrainConfig, precision: str, rng: Generator
) -> tuple[float, float]:
    """One optimiser step on x0 (B,T): the loss in nats per token and the gradient's norm before clipping."""
    noised = PROCESSES[config.process](x0, model.config.mask_id, sample_t(len(x0), rng), rng)
    with autocast(config, precision):
        loss = pretraining_loss(model, x0.to(config.device), noised.to(config.device))
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    if not math.isfinite(loss.item() + grad_norm.item()):
        raise BadLuck(f"loss: expected a finite one, got {loss.item()} with gradient {grad_norm.item()}; lower lr")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item(), grad_norm.item()


def train(
    config: TrainConfig | None = None, resume: str | Path | None = None, stop: Callable[[], bool] = lambda: False
) -> Iterator[TrainStep]:
    """Train, yielding every step. With `config.out` a log and checkpoints are written there; `resume` goes on with such
    a run, bit for bit if it counts in steps. When `stop()` answers True after a step, that step is saved and is the
    last. Raises BadInput and BadLuck."""
    with ExitStack() as stack:
        run = stack.enter_context(Run.resume(resume)) if resume is not None else None
        config = TrainConfig(**run.config) if run else config or TrainConfig()
        saved = load_state(run.newest) if run else None
        tokenizer = Tokenizer.load(run.newest) if run else make_tokenizer(config.tokenizer, config.data)
        text = tokenise(config.data, tokenizer, cache_dir() / "tokens", config.length)
        rng = Generator().manual_seed(config.seed)
        if saved:
            if saved["text"] != text.fingerprint:
                raise BadInput(f"data: expected the text this run began with, got another in {config.data}; restore it")
            model, _ = load(run.newest, config.device, torch.float32)
            optimizers = make_optimizers(model, config)
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            precision, notices = saved["precision"], run.notices
            set_rng_state(saved["rng"], data=rng)
        else:
            run = stack.enter_context(Run.create(config.out, asdict(config))) if config.out else None
            model = make_model(config, tokenizer, rng)
            optimizers = make_optimizers(model, config)
            precision, notices = choose_precision(model, text, config)

        first, before = (saved["step"], saved["seconds"]) if saved else (0, 0.0)
        start = time.perf_counter()
        seconds = before
        for step, x0 in enumerate(batches(text.train, config.batch_size, config.length, rng), start=first + 1):
            progress = seconds / 60 / config.minutes if config.minutes else step / (config.steps + 1)
            lr = set_rate(optimizers, config, progress)
            loss, grad_norm = update(model, optimizers, random_length(x0, rng), config, precision, rng)
            seconds = before + time.perf_counter() - start
            last = stop() or (seconds >= 60 * config.minutes if config.minutes else step >= config.steps)
            evaluate = last or step % config.eval_every == 0
            bound = validation_bound(model, text, config, precision) if evaluate else None
            tokens = step * config.batch_size * config.length
            speed = (tokens - first * config.batch_size * config.length) / (time.perf_counter() - start)
            record = {"step": step, "loss": loss, "bound": bound, "lr": lr, "grad_norm": grad_norm, "tokens": tokens}
            record |= {"tokens_per_second": speed, "seconds": seconds}
            if run:
                about = {"characters_per_token": text.characters_per_token, "precision": precision}
                run.log(record | about | ({"notices": notices} if notices else {}))
                if last or step % config.checkpoint_every == 0:
                    states = [optimizer.state_dict() for optimizer in optimizers]
                    state = {"step": step, "seconds": seconds, "precision": precision, "text": text.fingerprint}
                    run.save(step, model, tokenizer, state | {"optimizers": states, "rng": rng_state(data=rng)})
            yield TrainStep(*record.values(), model, tokenizer, text, config, tuple(notices))
            notices = []
            if last:
                return
