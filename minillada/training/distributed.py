"""Spread a training over several processes, started by `torchrun --standalone --nproc_per_node=N train_tiny.py …`.

Every process draws the same batch and noise and takes its own rows of them; gradients are averaged (DDP), or averaged
and sharded with the weights and the optimisers' state (FSDP2). So the number of processes changes how fast a run is and
not what it computes, but for rounding. Rank 0 alone writes and prints. Processes agree through small tensors on the
CPU. Without torchrun there is one process, and nothing here does anything.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..errors import BadInput, BadLuck
from ..model import LLaDA
from .config import RunConfig
from .lora import model_of
from .passes import hasten

T = TypeVar("T")


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def processes() -> Iterator[None]:
    """Meet the other processes that torchrun started, if it did; those of rank 1 and above fall silent."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if (own := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():  # a run on CPUs needs no GPU for each
        torch.cuda.set_device(own)  # what "cuda" means from here on
    dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on a GPU
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
        try:
            yield
            agree(0)  # that all are here: what still held a tensor while Python shuts down would abort the process
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "Connection" not in str(error) and "gloo" not in str(error):
                raise
            what = f"process {rank()}: expected all {world_size()} processes to go on, got a lost one"
            raise BadLuck(f"{what}; see what that one said, then use --resume") from error
        finally:
            dist.destroy_process_group()


def check_gpus(device: str) -> None:
    """Raise BadLuck if processes are to train on GPUs and this one has none of its own."""
    there = torch.cuda.device_count()
    if world_size() > 1 and torch.device(device).type == "cuda" and int(os.environ["LOCAL_RANK"]) >= there:
        what = f"device: expected a GPU for each of the processes on this machine, got {there}"
        raise BadLuck(f"{what}; start at most {there}, or use --device cpu")


def reduce(tensor: Tensor, how: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX) -> Tensor:
    """Replace every element, in place, by its largest value (or the sum) over all processes; return the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor, how)
    return tensor


def agree(*values: float) -> list[float]:
    """Return the same numbers in every process: the largest of each."""
    return reduce(torch.tensor(values, dtype=torch.float64)).tolist()


@contextmanager
def together() -> Iterator[None]:
    """End every process if one fails inside, which must not wait for another: the first that failed raises its error,
    the others exit with code 2."""
    failure = None
    try:
        yield
    except (BadInput, OSError) as error:
        failure = error
    (first,) = agree(-rank() if failure else -world_size())
    if failure and -first == rank():
        raise failure
    if -first < world_size():
        sys.exit(2)


def in_turn(make: Callable[[], T]) -> T:
    """Return what make() returns: first in rank 0, and then in the others, which find the files that it wrote."""
    with together():
        made = make() if rank() == 0 else None
    with together():
        return make() if rank() else made


def check_same(what: str, fingerprint: str) -> None:
    """Raise BadInput unless every process has the same fingerprint (hex)."""
    number = int(fingerprint[:12], 16)
    if agree(number, -number) != [number, -number]:
        raise BadInput(f"{what}: expected the same in every process, got different ones; share one directory")


def share(n: int, parts: int = 1) -> list[Tensor]:
    """Return which of n rows this process computes, in `parts` of equal size; some twice, if they do not come out even.
    Masking levels fall with the row, and every part should have high and low ones: so rows are dealt one by one.
    8 rows in 2 parts, in process 0 of 2 -> [0, 4], [2, 6]."""
    size = world_size() * parts
    return [torch.arange(rank() + i * world_size(), -(-n // size) * size, size) % n for i in range(parts)]


def shares(model: nn.Module, n: int, parts: int) -> Iterator[Tensor]:
    """Yield the rows of each part of `share`. Processes exchange gradients (DDP) only in the backward pass of the last;
    sharded ones (FSDP) every time, or every process would have to hold all of them until then."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    for number, rows in enumerate(share(n, parts), 1):
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = number == parts
        yield rows


def spread(model: LLaDA, config: RunConfig) -> nn.Module:
    """Move a model from the CPU to its device, and return what to call in its place in training. With config.shard the
    model itself is sharded, in place and layer by layer: it may be too large for one device."""
    several, called = world_size() > 1, model
    if several and config.shard:
        for part in (*model.layers, model):
            fully_shard(part)
    else:
        model.to(config.device)
        if torch.device(config.device).type == "cpu" and not config.compile:
            hasten(model)
        called = DistributedDataParallel(model, gradient_as_bucket_view=True) if several else model
    return torch.compile(called) if config.compile else called


def full(tensor: Tensor) -> Tensor:
    """Return a sharded tensor put together, in every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Put sharded tensors together, one by one, on the CPU of rank 0; elsewhere they become None."""
    whole = ((name, full(t)) for name, t in tensors.items())
    return {name: t.cpu() if rank() == 0 else None for name, t in whole}


def unsharded(model: LLaDA) -> LLaDA:
    """Return the model, or one like it that holds in rank 0 all that is sharded. Every process must call this."""
    if not isinstance(model, FSDPModule):
        return model
    state = gathered(model.state_dict())
    return model_of(state, model) if rank() == 0 else model


def optimizer_state(optimizers: Sequence[Optimizer]) -> dict:
    """Return what no config says, for `Run.save`: tensors by names like "optimizer.0.12.exp_avg", that of parameter 12,
    and each group's full rate. Every process must call this."""
    states = {f"optimizer.{i}.{p}": s for i, o in enumerate(optimizers) for p, s in o.state_dict()["state"].items()}
    tensors = {f"{prefix}.{name}": tensor for prefix, state in states.items() for name, tensor in state.items()}
    return gathered(tensors) | {"rates": [group["initial_lr"] for o in optimizers for group in o.param_groups]}


def load_optimizers(optimizers: Sequence[Optimizer], saved: dict) -> None:
    """Restore what a run of any number of processes saved; tensors are sharded as the weights are."""
    groups = [group for o in optimizers for group in o.param_groups]
    for group, rate in zip(groups, saved.get("rates", [g["initial_lr"] for g in groups]), strict=True):
        group["initial_lr"] = rate
    for i, optimizer in enumerate(optimizers):
        parameters, state = [p for group in optimizer.param_groups for p in group["params"]], defaultdict(dict)
        for name in (name for name in saved if name.startswith(f"optimizer.{i}.")):
            number, kind = name.split(".")[2:]
            tensor, p = saved[name], parameters[int(number)]
            if isinstance(p, DTensor) and tensor.shape == p.shape:
                tensor = distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
            state[int(number)][kind] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
