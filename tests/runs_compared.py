"""What two runs of training left behind, side by side."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from minillada import train
from minillada.training.config import RunConfig


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").iterdir())[-1] / "model.safetensors")


def logged(run: Path, *names: str) -> list[list[float]]:
    return [[line[name] for name in names] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines())]


def assert_an_interruption_changes_nothing(config: Callable[..., RunConfig], directory: Path, *names: str) -> None:
    """Six steps, and six that stop after four and resume, have the same log and weights; which are not the first."""
    whole, parts = directory / "whole", directory / "parts"
    list(train(config(out=str(whole))))
    list(train(config(out=str(parts)), stop=iter([False, False, False, True]).__next__))
    torch.rand(7)
    assert [step.step for step in train(resume=parts)] == [5, 6]
    assert logged(parts, *names) == logged(whole, *names)
    expected, first = weights(whole), weights(Path(config().start))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(parts).items())
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in first.items())
