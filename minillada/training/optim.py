"""Optimisers, what a step that failed is undone with, the precision, and how memory is saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from ..files import one_line
from ..model import LLaDA
from ..weights.device import bfloat16_instructions
from .config import RunConfig
from .distributed import agree
from .muon import Muon


def make_optimizers(model: nn.Module, config: RunConfig) -> list[Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for the rest, or AdamW for both; the matrices come first."""
    inner = [p for name, p in model.named_parameters() if "layers." in name]  # of the model, and of a tower that sees
    matrices = [p for p in inner if p.dim() == 2]  # not stacked experts: Muon wants plain ones
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    adamw = partial(AdamW, betas=(0.9, 0.95), fused=True)
    dtype = torch.bfloat16 if bfloat16_instructions(torch.device(config.device).type) else torch.float32
    first = partial(Muon, dtype=dtype) if config.optimizer == "muon" else adamw
    group = lambda parameters, lr: [{"params": parameters, "initial_lr": lr}]
    of_matrices = first(group(matrices, config.lr), lr=config.lr, weight_decay=config.weight_decay)
    return [of_matrices, adamw(group(rest, config.adam_lr), lr=config.adam_lr, weight_decay=0.0)]


def snapshot(model: nn.Module, optimizers: list[Optimizer]) -> list[dict]:
    """Copy all that a step changes to the host's memory; of what is sharded, this process's shard."""
    return copied([owner.state_dict() for owner in (model, *optimizers)])


def restore(model: nn.Module, optimizers: list[Optimizer], states: list[dict]) -> None:
    """Put a snapshot back. It can be put back again: optimisers would go on in the very tensors they are given."""
    for owner, state in zip((model, *optimizers), copied(states), strict=True):
        owner.load_state_dict(state)


def copied(state: object) -> object:
    """Copy nested dicts and lists, their tensors to the CPU."""
    return tree_map(lambda x: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x, state)


def recompute(model: LLaDA) -> LLaDA:
    """Have every layer remember its input alone, and be computed again in the backward pass: less memory, more time."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return model


@contextmanager
def evaluation(config: RunConfig) -> Iterator[None]:
    """Evaluate a model inside in the config's precision. Raises BadInput if it is to be compiled and cannot be."""
    failures = torch._dynamo.exc.TorchDynamoException if config.compile else ()
    line = one_line("compile: expected PyTorch to compile the model", "leave the option out", faults=failures)
    with line, torch.autocast(torch.device(config.device).type, torch.bfloat16, config.precision == "bfloat16"):
        yield


def choose_precision(config: RunConfig) -> tuple[str, list[str]]:
    """Return config.precision; for "auto", bfloat16 if every process's device has instructions for it (else it is
    emulated, which is slow), or float32. And lines for the user: what was chosen, and why."""
    if config.precision != "auto":
        return config.precision, []
    found = bfloat16_instructions(torch.device(config.device).type)
    if agree(not found) != [0]:
        return "float32", ["precision float32: this device has no instructions for bfloat16"]
    why = f"precision bfloat16: this device has instructions for it ({found}); --precision float32 turns it off"
    return "bfloat16", [why]
