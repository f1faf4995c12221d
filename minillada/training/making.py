"""Make what a run learns with: data, tokenizer, model, objective and optimisers, anew or as a checkpoint has them."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, nn
from torch.optim import Optimizer

from ..errors import BadInput
from ..files import one_line
from ..model import LLaDA, ModelConfig
from ..text.chat import ChatTemplate
from ..text.corpora import cache_dir, make_tokenizer
from ..text.ids import Tokens, by_documents, tokenise
from ..text.tokenizer import Tokenizer
from ..train import Objective
from ..weights.checkpoint import check, expect_tokenizer, load
from ..weights.device import slow_experts
from ..weights.vision import sees, with_album
from .balance import Balanced
from .config import DistilConfig, RewardConfig, RunConfig, SFTConfig, TrainConfig, TunedConfig, VRPOConfig
from .distil import Distil
from .distributed import check_gpus, check_same, in_turn, load_optimizers, spread, together, world_size
from .lora import adapt, adapters
from .optim import choose_precision, make_optimizers, recompute
from .pretraining import TextPretraining, examples_of
from .rewards import RISK, Rewards, ask
from .sft import SFT, Items, dialogue, read_items, teach
from .spelling import Spellings, spelled
from .vrpo import VRPO, compared


class Made(NamedTuple):
    """Hold what a run learns with: made from its config, or read back from a checkpoint."""

    config: RunConfig  # with the precision that was chosen
    notices: list[str]  # lines for the user
    text: Tokens
    saves: Tokenizer | ChatTemplate  # what is saved beside the model
    guide: dict  # how the model is decoded unless told otherwise, and what to try with it
    base: str | None  # a hash of the model that the run began with, if that is needed to go on
    objective: Objective
    model: LLaDA
    called: nn.Module  # what is called in its place, in training
    trained: nn.Module  # what changes: the model or its adapters
    optimizers: list[Optimizer]
    rng: Generator  # of the noise
    average: LLaDA | None = None  # of the weights, if the objective learns from it


def make_model(config: TrainConfig, tokenizer: Tokenizer, rng: Generator) -> LLaDA:
    """Return a new model with random weights, in which tokens that are spelled alike begin alike."""
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    sizes = config.model if config.block is None else config.model | {"block": config.block}
    model = LLaDA(ModelConfig(vocab_size=tokenizer.vocab_size, max_len=config.length, **ids, **sizes))
    model.init_weights(rng)
    embedding = model.embed.weight.data[: tokenizer.vocab_size]
    embedding.copy_(spelled(tokenizer, embedding.shape[1], rng) * embedding.std())
    return model


def read_dialogues(config: TunedConfig, newest: Path | None) -> tuple[Items, ChatTemplate, str, str | None]:
    """Return the lines of a file or a task's questions as ids, the template with its tokenizer, the directory of the
    model to begin with, and a hash of it if the run needs it while it lasts: under adapters, or as a reference."""
    lasts = config.keeps_start or config.lora > 0
    with together():
        found = check(newest if newest and not lasts else config.start)
        base = hashlib.sha256(repr((found.entries, found.hashes)).encode()).hexdigest() if lasts else None
        expect_tokenizer(found.directory, f"from {config.start}")
        template = teach(found.directory, Tokenizer.load(found.directory, {"mask": found.config.mask_id}))
    given = config.start if newest else str(found.directory)
    if isinstance(config, RewardConfig):
        return in_turn(lambda: ask(config, template, found.config)), template, given, base
    turns_of = compared if isinstance(config, VRPOConfig) else dialogue
    vision = found.meta.embed.vision if sees(found.meta) else None
    items = in_turn(lambda: read_items(config.data, template, found.config, turns_of, vision))
    return items, template, given, base


def finished(config: RunConfig, step: int, seconds: float) -> bool:
    """Return whether a run has done all its steps, or used up its minutes."""
    return step == config.steps or (config.minutes is not None and seconds >= 60 * config.minutes)


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
    if getattr(config, "lora", 0):
        model = adapt(load(config.start)[0], config.lora, rng)
        if saved:
            with one_line("adapters: expected those of this run", "use another checkpoint", Exception):
                adapters(model).load_state_dict({n: saved[f"adapters.{n}"] for n in adapters(model).state_dict()})
        return model
    if newest is None and isinstance(config, TrainConfig) and config.start is None:
        return make_model(config, tokenizer, rng)
    model = load(newest or config.start, "cpu", torch.float32)[0]
    if isinstance(config, TrainConfig) and config.block is not None:  # weights know of no blocks, and of no length
        model.config = replace(model.config, block=config.block, max_len=max(model.config.max_len, config.length))
    return model


def frozen(config: TunedConfig, text: Items) -> LLaDA:
    """Return the model that a run began with, to be compared with or learned from."""
    return with_album(load(config.start, config.device, torch.float32)[0], text.album).requires_grad_(False)


def begin_average(config: RunConfig, text: Tokens, saved: dict) -> LLaDA | None:
    """Return the moving average of the model, if it is learned from: the model as it began, or as a run has it."""
    if not getattr(config, "consistency", 0):
        return None
    average = frozen(config, text)
    if saved:
        with one_line("average: expected that of this run", "use another checkpoint", Exception):
            average.load_state_dict({name: saved[f"average.{name}"] for name in average.state_dict()})
    return average


def begin_objective(
    config: RunConfig, text: Tokens, c: ModelConfig, average: LLaDA | None = None, spellings: Spellings | None = None
) -> Objective:
    """Return what a config asks to learn, balanced if there are experts."""
    if isinstance(config, TrainConfig):
        objective = TextPretraining(text, config, c.mask_id, c.eos_id, c.block, c.vocab_size, spellings)
    elif isinstance(config, SFTConfig):
        objective = SFT(text, config, c)
    elif isinstance(config, RewardConfig):
        objective = Rewards(text, config, c)
    elif isinstance(config, DistilConfig):
        objective = Distil(text, config, c, frozen(config, text), average)
    else:
        reference = None if config.lora else frozen(config, text)
        objective = VRPO(text, config, c.mask_id, reference, block=c.block)
    return Balanced(objective, config) if c.n_expert else objective


def make(config: RunConfig, newest: Path | None = None, saved: dict | None = None) -> Made:
    """Read the data and make all that a run learns with; or read it back from its newest checkpoint, with the state
    saved there. Writes nothing but caches. Raises BadInput and BadLuck."""
    saved, base, rng = saved or {}, None, Generator().manual_seed(config.seed)
    parts = world_size() * config.accumulate  # of a batch, which have as many rows each
    with together():
        check_gpus(config.device)
        if config.batch_size % parts:
            what = f"batch_size: expected a multiple of {parts} (processes times accumulate), got {config.batch_size}"
            raise BadInput(f"{what}; choose such a batch_size, or accumulate less")
    precision, notices = choose_precision(config)
    config = replace(config, precision=precision)
    if isinstance(config, TrainConfig):
        begins = newest or (config.start and check(config.start).directory)
        saves = in_turn(lambda: Tokenizer.load(begins) if begins else make_tokenizer(config.tokenizer, config.data))
        text = in_turn(lambda: tokenise(config.data, saves, cache_dir() / "tokens", config.length))
        if config.rows == "documents":
            with together():
                text = by_documents(text, config.length, saves.eos_id)
    else:
        text, saves, start, base = read_dialogues(config, newest)
        config = replace(config, start=start)
    check_same("data", text.fingerprint)
    with together():
        if saved:
            check_beginning(saved, text, base, config)
        model = with_album(begin_model(config, saves, rng, newest, saved), getattr(text, "album", ()))
        average = begin_average(config, text, saved)
        spellings = Spellings(saves, config.bpe_dropout, config.seed) if getattr(config, "bpe_dropout", 0) else None
        objective = begin_objective(config, text, model.config, average, spellings)
    trained = adapters(model) if getattr(config, "lora", 0) else model
    called = spread(recompute(model) if config.recompute else model, config)
    optimizers = make_optimizers(model, config)
    if saved:
        with one_line("optimizers: expected the state of this run's", "use another checkpoint", Exception):
            load_optimizers(optimizers, saved)
    guide = {"sampling": config.sampling}
    if isinstance(config, TrainConfig):
        guide |= {"after_eos": config.rows == "documents", "examples": examples_of(text, saves)}
    if getattr(config, "algorithm", "rejection") != "rejection":
        notices.append(f"algorithm {config.algorithm}: {RISK}")
    if getattr(config, "twin", 0) and not saved:
        notices.append(f"for {config.twin:.0%} of the training it learns from left to right; then the bound falls fast")
    notices += slow_experts(model.config, config.device, getattr(torch, precision))
    return Made(config, notices, text, saves, guide, base, objective, model, called, trained, optimizers, rng, average)
