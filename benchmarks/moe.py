"""How fast the mixture of experts is: `python benchmarks/moe.py [--threads 2] [--seconds 10] [--out moe.json]`.

One layer, forward and backward, 2048 tokens of width 384, experts of width 128, against two plain loops over experts in
the same run: one over separate matrices, as a list of modules holds them, and one that indexes the stacked parameters,
whose backward pass fills a gradient of the whole stack for every expert. Then training steps of `tiny-moe` against
`tiny`. The contestants take turns, and medians count, so that what else the machine does hits all alike.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from minillada.model import LLaDA, ModelConfig, MoE
from minillada.text.ids import Tokens
from minillada.train import learn
from minillada.training.balance import Balanced
from minillada.training.config import PRESETS, TrainConfig
from minillada.training.optim import make_optimizers
from minillada.training.pretraining import TextPretraining

SIZES = {"8 experts, top 2": (8, 2), "64 experts, top 8": (64, 8)}


def loop(moe: MoE, x: Tensor, experts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The layer on x (N,C), one expert after the other."""
    weights, chosen = moe.route(moe.router(x))
    y = torch.zeros_like(x)
    for e, (gate, up, down) in enumerate(experts):
        token, slot = (chosen == e).nonzero(as_tuple=True)
        visits = x[token]
        out = (F.silu(visits @ gate.T) * (visits @ up.T)) @ down.T
        y.index_add_(0, token, out * weights[token, slot, None].to(out.dtype))
    return y


def separate(moe: MoE, x: Tensor) -> Tensor:
    return loop(moe, x, zip(moe.gate.unbind(), moe.up.unbind(), moe.down.unbind(), strict=True))


def indexed(moe: MoE, x: Tensor) -> Tensor:
    return loop(moe, x, ((moe.gate[e], moe.up[e], moe.down[e]) for e in range(moe.c.n_expert)))


def take_turns(contestants: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, one of each in turn, until the time is up; the first round only warms up."""
    times = {name: [] for name in contestants}
    start, rounds = time.perf_counter(), 0
    while rounds < 4 or time.perf_counter() - start < seconds:
        for name, call in contestants.items():
            begin = time.perf_counter()
            call()
            if rounds:
                times[name].append(time.perf_counter() - begin)
        rounds += 1
    return times


def layer(size: str, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Median milliseconds of forward and backward."""
    n_expert, active = SIZES[size]
    sizes = {"d_model": 384, "n_expert": n_expert, "n_expert_active": active, "d_expert": 128}
    model = LLaDA(ModelConfig(vocab_size=2, mask_id=0, n_layer=1, **sizes)).to(dtype)
    model.init_weights(Generator().manual_seed(0))
    moe = model.layers[0].ffn
    rng = Generator().manual_seed(1)
    x, gradient = (torch.randn(2048, 384, generator=rng).to(dtype) for _ in range(2))
    x.requires_grad_()

    def call(forward: Callable[[MoE, Tensor], Tensor]) -> Callable[[], None]:
        def forward_and_backward() -> None:
            forward(moe, x).backward(gradient)
            moe.zero_grad()
            x.grad = None

        return forward_and_backward

    ours = {"grouped": lambda moe, x: moe(x), "separate": separate, "indexed": indexed}
    return {n: 1000 * median(t) for n, t in take_turns({n: call(f) for n, f in ours.items()}, seconds).items()}


def training(precision: str, seconds: float) -> dict[str, float]:
    """Tokens per second of optimiser steps on random ids; the median step counts."""
    contestants, batch = {}, {}
    for preset in ("tiny", "tiny-moe"):
        config = TrainConfig(preset=preset, precision=precision, twin=0.0)
        model = LLaDA(ModelConfig(vocab_size=4096, mask_id=0, **PRESETS[preset]["model"]))
        ids = np.random.default_rng(0).integers(1, 4096, 100_000).astype(np.uint16)
        objective = Balanced(TextPretraining(Tokens(ids, ids, 1.0, 1.0, ""), config, 0), config)
        objective = objective if model.config.n_expert else objective.objective
        forever = replace(config, steps=10**9)
        steps = learn(model, make_optimizers(model, config), objective, forever, Generator().manual_seed(0))
        contestants[preset] = partial(next, steps)
        batch[preset] = config.batch_size * config.length
    return {name: batch[name] / median(times) for name, times in take_turns(contestants, seconds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="for each of the six measurements")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = {"python": platform.python_version(), "torch": torch.__version__, "threads": args.threads}
    result = about | {"layer, ms": {}, "training, tokens/s": {}}
    print(f"{'forward and backward, ms':38} {'grouped':>8} {'separate':>16} {'indexed':>16}")
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            ms = layer(size, dtype, args.seconds)
            name = f"{size}, {str(dtype)[6:]}"
            result["layer, ms"][name] = {key: round(value, 2) for key, value in ms.items()}
            loops = (f"{ms[key]:8.1f} ({ms[key] / ms['grouped']:.2f} x)" for key in ("separate", "indexed"))
            print(f"{name:38} {ms['grouped']:8.1f}", *loops, flush=True)
    for precision in ("float32", "bfloat16"):
        speed = training(precision, args.seconds)
        result["training, tokens/s"][precision] = {key: round(value) for key, value in speed.items()}
        dense, sparse = speed["tiny"], speed["tiny-moe"]
        print(f"training, {precision}, tokens/s: tiny {dense:,.0f}, tiny-moe {sparse:,.0f} ({sparse / dense:.2f} x)")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
