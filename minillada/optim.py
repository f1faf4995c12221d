"""How a training step is taken: optimisers, the learning rate's course, and the precision of the arithmetic."""

import time
from functools import partial

import torch
from torch import Generator, nn

from .data import Tokens, validation_batch
from .diffusion import exact_count, pretraining_loss
from .presets import TrainConfig


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and AdamW for the rest, or AdamW for both; the matrices come first.

    Muon (arXiv:2502.16982) makes every update orthogonal; here that is what makes three minutes enough.
    """
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]  # not stacked experts: Muon wants plain ones
    chosen = set(matrices)
    rest = [p for p in model.parameters() if p not in chosen]
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95))
    first = torch.optim.Muon if config.optimizer == "muon" else adamw
    return [
        first(matrices, lr=config.lr, weight_decay=config.weight_decay),
        adamw(rest, lr=config.adam_lr, weight_decay=0.0),
    ]


def rate(progress: float, config: TrainConfig) -> float:
    """Warm-up, stable, decay: the share of the full learning rate at a progress from 0 to 1."""
    return min(1.0, progress / config.warmup if config.warmup else 1.0, (1 - progress) / max(config.decay, 1e-9))


def set_rate(optimizers: list[torch.optim.Optimizer], config: TrainConfig, progress: float) -> float:
    """Give every group its share of the full rate; return the first optimiser's."""
    share = rate(progress, config)
    for optimizer, full in zip(optimizers, (config.lr, config.adam_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = full * share
    return config.lr * share


def autocast(config: TrainConfig, precision: str) -> torch.autocast:
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=precision == "bfloat16")


def choose_precision(model: nn.Module, text: Tokens, config: TrainConfig) -> tuple[str, list[str]]:
    """config.precision; "auto" times a forward and backward pass in both, the best of five, and says what it took.

    Processors without bfloat16 of their own are slow at it. No weight is changed.
    """
    if config.precision != "auto":
        return config.precision, []
    x0, seconds = validation_batch(text.val, config.batch_size, config.length), {}
    noised = exact_count(x0, model.config.mask_id, torch.full((len(x0),), 0.5), Generator())
    for precision in ("float32", "bfloat16"):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            with autocast(config, precision):
                loss = pretraining_loss(model, x0.to(config.device), noised.to(config.device))
            loss.backward()
            loss.item()  # waits for a GPU
            times.append(time.perf_counter() - start)
        seconds[precision] = min(times)
    model.zero_grad(set_to_none=True)
    took = min(seconds, key=seconds.get)
    figures = ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in seconds.items())
    return took, [f"precision {took}: forward and backward in {figures}"]
