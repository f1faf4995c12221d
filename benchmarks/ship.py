"""Train the models that come with the package, and write them to minillada/shipped/ (docs/shipped.md).

    python benchmarks/ship.py sudoku4 tales-ar tales questions

What is written is a model in bfloat16, its tokenizer and generation_config.json. `questions` begins with what
pre-training has made for `tales`. Pre-training and SFT go on where they were interrupted when the command is repeated.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from shutil import rmtree

import torch
from torch import Generator, Tensor, nn

import minillada
from minillada.diffusion import exact_count, model_bound, sample_t
from minillada.files import write_file, write_json, write_manifest
from minillada.measure.blocks import block_levels, bound, noise_blocks
from minillada.measure.twin import twin_loss
from minillada.text.chat import ChatTemplate
from minillada.text.corpora import TELLER
from minillada.text.tales import tales
from minillada.text.tasks import make_task
from minillada.train import LearnConfig, Pretraining, learn
from minillada.training.config import SFTConfig, TrainConfig
from minillada.training.making import make
from minillada.training.optim import make_optimizers
from minillada.training.run import train
from minillada.weights.checkpoint import locate
from minillada.weights.shipped import HOME, SHIPPED

HERE = Path("runs/shipped")  # data and runs
BOARD = {"n_layer": 3, "n_head": 4, "d_model": 96, "d_ff": 256, "rope_theta": 100.0}
STORIES = {"temperature": 0.7}
BLOCKS = {**STORIES, "block": 4, "cache": "block"}
GUIDES = {
    "tales": {"sampling": BLOCKS, "filling": {"block": 0, "cache": "none"}, "examples": {
        "prompt": ["Once upon a time a brave child named Greta", "There was once a shy child whose name was Otto"],
        "fill": ["On her birthday she was given a[MASK][MASK].", "A[MASK] hedgehog offered to help for a[MASK]."],
    }},
    "tales-ar": {"sampling": STORIES},
    "sudoku4": {"sampling": {"temperature": 0.0}, "examples": {"prompt": ["2.14..3.342..24.="]}},
    "questions": {"sampling": {"temperature": 0.0, "gen_len": 16}, "examples": {
        "chat": [example.prompt for example in make_task("questions", 0, n_test=3).test],  # not trained on
    }},
}  # fmt: skip


def data(name: str) -> str:
    """Write what a model is trained on, once: JSONL; return its path."""
    path = HERE / f"{name}.jsonl"
    if not path.exists():
        if name == "tales":
            rows = ({"text": f"{tale}\n"} for tale in tales(1, 40_000))
        elif name == "sudoku4":
            rows = ({"text": f"{e.text}\n"} for e in make_task(name, 60_000, 1, 0).train)
        else:
            rows = ({"prompt": e.prompt, "answer": e.answer.strip()} for e in make_task(name, 20_000, 1, 0).train)
        write_file(path, (f"{json.dumps(row)}\n".encode() for row in rows))
    return str(path)


def config_of(name: str) -> TrainConfig | SFTConfig:
    """Return how one of the models is trained."""
    out = str(HERE / name)
    if name == "sudoku4":
        return TrainConfig(data=data(name), model=BOARD, tokenizer="characters", rows="documents", length=36, out=out,
                           steps=1200, batch_size=64)  # fmt: skip
    if name == "questions":
        start = longer(192)
        return SFTConfig(data=data(name), start=start, steps=2000, batch_size=8, out=out, eval_every=500)
    steps = {"tales-before": 6000, "tales": 2500, "tales-ar": 3000}[name]
    return TrainConfig(data=data("tales"), model=TELLER, tokenizer="bpe:1024", rows="documents", length=136,
                       steps=steps, batch_size=16, out=out, sampling=STORIES, eval_every=500)  # fmt: skip


def longer(length: int) -> str:
    """Write the model that pre-training has made for `tales` as one of longer rows, so that a question fits behind a
    tale: its weights know of no length. Return its directory."""
    target = HERE / f"tales-{length}"
    if not target.exists():
        model, tokenizer = minillada.load(HERE / "tales-before")
        model.config = replace(model.config, max_len=length)
        minillada.save(model, target, tokenizer)
    return str(target)


def learned(name: str) -> None:
    """Train one of the models, or go on with it; print how it goes."""
    config = config_of(name)
    began = (Path(config.out) / "run.json").exists()
    if (Path(config.out) / "checkpoints" / f"step-{config.steps:08d}").exists():
        return
    for step in train(None if began else config, config.out if began else None):
        if step.bound is not None:
            print(f"{name}: step {step.step}, {step.seconds:.0f} s, {step.config.units(step.bound)}", flush=True)


class Twin(Pretraining):
    """Learn to predict the next token: the objective of the autoregressive twin."""

    def losses(self, model: nn.Module, batch: Tensor, rng: Generator) -> Iterator[Tensor]:
        yield twin_loss(model, batch)


class Solver(Pretraining):
    """Learn the answer behind a puzzle, which is never hidden: hiding it too would teach the 192 boards by heart."""

    def losses(self, model: nn.Module, batch: Tensor, rng: Generator) -> Iterator[Tensor]:
        answer = torch.arange(batch.shape[1]).expand_as(batch) >= 18
        noised = exact_count(batch, self.mask_id, sample_t(len(batch), rng), rng, maskable=answer)
        yield model_bound(model, batch, noised).mean() / 18


class Blocks(Pretraining):
    """Learn to write in blocks, and in the first `full` rows of a batch to fill holes from both sides."""

    def __init__(self, *args: object, block: int, full: int) -> None:
        super().__init__(*args)
        self.block, self.full = block, full

    def losses(self, model: nn.Module, batch: Tensor, rng: Generator) -> Iterator[Tensor]:
        for rows, block in ((batch[self.full :], self.block), (batch[: self.full], 0)):
            if len(rows):
                after_eos = torch.arange(rows.shape[1]).expand_as(rows) >= 1
                noised = noise_blocks(rows, self.mask_id, block_levels(rows, block, rng), rng, block, after_eos)
                yield bound(model, rows, noised, block=block).mean() / rows.shape[1] * len(rows) / len(batch)


# How `tales` goes on from `tales-ar`: block, full rows of 16, steps, steps that the rate is planned for, rate, decay.
ROUNDS = [(1, 0, 1000, 3000, 1.0, 0.4), (4, 4, 2500, 2500, 1.0, 0.5), (4, 10, 2600, 2600, 0.7, 0.7)]


def learned_directly(name: str) -> None:
    """Train a model of another objective by `learn` alone, which can't be resumed, and write it. `tales` goes on from
    the autoregressive twin, which has learned what a story remembers, in three rounds."""
    made, start = make(config_of(name)), time.perf_counter()
    rounds, parts = [(0, 0, *[made.config.steps] * 2, 1.0, 0.4)], (made.objective.batches, made.objective.held)
    if name == "tales":
        rounds = ROUNDS
        made.model.load_state_dict(minillada.load(HERE / "tales-ar")[0].state_dict())
    for block, full, steps, planned, rate, decay in rounds:
        made.rng.manual_seed(0)
        kind = {"tales-ar": Twin, "sudoku4": Solver, "tales": partial(Blocks, block=block, full=full)}[name]
        optimizers = make_optimizers(made.model, made.config)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] *= rate
        objective, config = kind(*parts, made.model.config.mask_id), LearnConfig(steps=planned, decay=decay)
        for step in islice(learn(made.model, optimizers, objective, config, made.rng), steps):
            if step.step % 200 == 0:
                seconds = time.perf_counter() - start
                print(f"{name}: step {step.step}, {seconds:.0f} s, loss {step.loss:.4f}", flush=True)
    rmtree(HERE / name, ignore_errors=True)
    minillada.save(made.model, HERE / name, made.saves)


def ship(name: str) -> None:
    """Write a trained model to minillada/shipped/ in bfloat16, with its tokenizer and what else a chat needs."""
    source, target = locate(HERE / name), HOME / name
    model, tokenizer = minillada.load(source)
    rmtree(target, ignore_errors=True)
    minillada.save(model.bfloat16(), target, ChatTemplate.load(source, tokenizer) if name == "questions" else tokenizer)
    guide = {**GUIDES[name], "after_eos": name != "questions"}
    write_json(target / "generation_config.json", {"minillada": guide})
    write_manifest(target)
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{target}: {model.n_parameters():,} parameters, {size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", choices=list(SHIPPED))
    for name in parser.parse_args().names:
        if name == "questions":
            learned("tales-before")
            learned(name)
        else:
            learned_directly(name)
        ship(name)


if __name__ == "__main__":
    main()
