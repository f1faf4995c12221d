"""How a training step is taken, and taken back: optimisers, the learning rate's course, precision, saving memory."""

import time
from functools import partial

import torch
from torch import Generator, Tensor, nn
from torch.distributed import ReduceOp
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from ..diffusion import Noised, exact_count, pretraining_loss
from ..files import one_line
from ..model import LLaDA
from ..text.ids import Tokens, validation_batch
from .balance import Routing, auxiliary_loss, watch_routing
from .config import TrainConfig
from .distributed import agree, full, reduce, share, synchronise, world_size


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers and AdamW for the rest, or AdamW for both; the matrices come first.

    Muon (arXiv:2502.16982, but with PyTorch's scale, that of its first publication) makes every update orthogonal; here
    that is what makes three minutes enough.
    """
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]  # not stacked experts: Muon wants plain ones
    chosen = set(matrices)
    rest = [p for p in model.parameters() if p not in chosen]
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95), fused=True)
    first = torch.optim.Muon if config.optimizer == "muon" else adamw
    return [
        first(matrices, lr=config.lr, weight_decay=config.weight_decay),
        adamw(rest, lr=config.adam_lr, weight_decay=0.0),
    ]


def rate(progress: float, config: TrainConfig) -> float:
    """Warm-up, stable, decay: the share of the full learning rate at a progress from 0 to 1."""
    return min(1.0, progress / config.warmup if config.warmup else 1.0, (1 - progress) / max(config.decay, 1e-9))


def set_rate(
    optimizers: list[torch.optim.Optimizer], config: TrainConfig, progress: float, factor: float = 1.0
) -> float:
    """Give every group its share of the full rate, times a factor; return the first optimiser's."""
    part = rate(progress, config) * factor
    for optimizer, whole in zip(optimizers, (config.lr, config.adam_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = whole * part
    return config.lr * part


def snapshot(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[dict]:
    """A copy, in the host's memory, of all that a step changes; of what is sharded, this process's shard."""
    return copied([owner.state_dict() for owner in (model, *optimizers)])


def restore(model: nn.Module, optimizers: list[torch.optim.Optimizer], states: list[dict]) -> None:
    """Put a snapshot back. It can be put back again: optimisers would go on in the very tensors they are given."""
    for owner, state in zip((model, *optimizers), copied(states), strict=True):
        owner.load_state_dict(state)


def copied(state: object) -> object:
    return tree_map(lambda x: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x, state)


def weight_norm(model: nn.Module) -> float:
    """Finite if every weight is."""
    return full(nn.utils.get_total_norm([p.detach() for p in model.parameters()])).item()


def recompute(model: LLaDA) -> LLaDA:
    """Keep of every layer its input alone, and compute the rest again in the backward pass: less memory, more time."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return model


def autocast(config: TrainConfig, precision: str) -> torch.autocast:
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=precision == "bfloat16")


def add_gradients(
    model: nn.Module, x0: Tensor, noised: Noised, config: TrainConfig, precision: str
) -> tuple[float, list[Routing]]:
    """Forward and backward for x0 (B,T), each process on its share of the rows and in `accumulate` passes.

    Gradients are those of the mean over all rows, which is returned, in nats per token, and of what balances experts;
    where each pass sent its tokens comes with it.
    """
    shares, loss, routings = share(len(x0), config.accumulate), torch.zeros(()), []
    failures = torch._dynamo.exc.TorchDynamoException if config.compile else ()
    for i, rows in enumerate(shares, start=1):
        synchronise(model, i == len(shares))
        mine = Noised(*(x[rows].to(config.device) for x in noised))
        with one_line("compile: expected PyTorch to compile the model", "leave the option out", faults=failures):
            with watch_routing(model) as seen, autocast(config, precision):
                part = pretraining_loss(model, x0[rows].to(config.device), mine) / len(shares)
            (part + auxiliary_loss(seen, config.balance, config.z_loss) / len(shares)).backward()
        routings += seen
        loss = loss + part.detach().cpu()  # which waits for a GPU
    return reduce(loss / world_size(), ReduceOp.SUM).item(), routings


def choose_precision(model: nn.Module, mask_id: int, text: Tokens, config: TrainConfig) -> tuple[str, list[str]]:
    """config.precision; "auto" times a forward and backward pass in both, the best of five, and says what it took.

    Processors without bfloat16 of their own are slow at it. No weight is changed.
    """
    if config.precision != "auto":
        return config.precision, []
    x0, seconds = validation_batch(text.val, config.batch_size, config.length), {}
    noised = exact_count(x0, mask_id, torch.full((len(x0),), 0.5), Generator())
    for precision in ("float32", "bfloat16"):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            add_gradients(model, x0, noised, config, precision)
            times.append(time.perf_counter() - start)
        (seconds[precision],) = agree(min(times))
    model.zero_grad(set_to_none=True)
    took = min(seconds, key=seconds.get)
    figures = ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in seconds.items())
    return took, [f"precision {took}: forward and backward in {figures}"]
