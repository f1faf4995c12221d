"""Training speed: what `train` does in a step, beside a plain eager float32 step of the same size, in the same run.

    python benchmarks/training.py --seconds 120 --out training.json    on an otherwise idle machine
    python benchmarks/training.py --compile --sizes "tiny, 8 × 128"    and ours compiled, which takes minutes

The contestants and a large matrix product in each of their dtypes take turns, a few steps each, until the time is up;
a figure is the median of its turns. "Share of peak" is the arithmetic of the matrix products that forward and backward
really do (counted, so what a step saves itself is not credited), over the whole step's time, optimiser included, as a
share of what the large product reached. What compiling takes is measured apart, over so many steps that all shapes of
batches have come.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillada.diffusion import PROCESSES, random_length, sample_t
from minillada.model import LLaDA, ModelConfig
from minillada.text.ids import Tokens, batches
from minillada.training.config import TrainConfig
from minillada.training.distributed import spread
from minillada.training.optim import add_gradients, choose_precision, make_optimizers
from minillada.training.run import update

W384 = {"n_layer": 6, "n_head": 6, "d_model": 384, "d_ff": 1024, "rope_theta": 100.0}
SIZES: dict[str, tuple[TrainConfig, int]] = {  # and the size of the vocabulary
    "tiny, 8 × 128": (TrainConfig(preset="tiny"), 4096),
    "10.7 M, 16 × 256": (TrainConfig(model=W384, batch_size=16, length=256), 69),
    "10.7 M, 12 × 64": (TrainConfig(model=W384, batch_size=12, length=64), 69),
}
WARM = 50  # steps that a compiled model takes before the race: by then it has met every shape
MATRIX = 1536  # rows and columns of the product that stands for the machine's peak

Step = Callable[[], object]


# ---- ours


def ours(config: TrainConfig, vocab_size: int) -> tuple[Step, Step, str, int]:
    """A step as `train` takes it, its forward and backward alone, the precision it chose, its parameters."""
    rng = Generator().manual_seed(0)
    ids = np.random.default_rng(0).integers(4, vocab_size, 100_000).astype(np.uint16)  # speed is the same for any text
    model = LLaDA(ModelConfig(vocab_size=vocab_size, mask_id=0, max_len=config.length, **config.model))
    optimizers, stream = make_optimizers(model, config), batches(ids, config.batch_size, config.length, 0)
    precision, _ = choose_precision(model, 0, Tokens(ids, ids, 1.0, 1.0, ""), config)
    called = spread(model, config)  # compiled, if the config says so

    def noised_batch() -> tuple:
        x0 = random_length(next(stream), rng)
        return x0, PROCESSES[config.process](x0, 0, sample_t(len(x0), rng), rng)

    def step() -> None:
        update(called, optimizers, *noised_batch(), config, precision)

    def passes() -> None:
        add_gradients(called, *noised_batch(), config, precision)
        model.zero_grad()

    return step, passes, precision, model.n_parameters()


# ---- the baseline: the same Transformer and LLaDA's guidelines as a textbook has them, and nothing done for speed


class PlainBlock(nn.Module):
    def __init__(self, n_head: int, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.gate, self.up = (nn.Linear(d_model, d_ff, bias=False) for _ in range(2))
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], dim=-1) * sin for y in (q, k))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Plain(nn.Module):
    """Tokens (B,T) -> logits (B,T,V)."""

    def __init__(
        self, vocab_size: int, length: int, n_layer: int, n_head: int, d_model: int, d_ff: int, rope_theta: float
    ) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, d_model), nn.Linear(d_model, vocab_size, bias=False)
        self.blocks = nn.ModuleList(PlainBlock(n_head, d_model, d_ff) for _ in range(n_layer))
        self.norm = nn.RMSNorm(d_model)
        half = torch.arange(0, d_model // n_head, 2) / (d_model // n_head)
        angles = (torch.arange(length)[:, None] * rope_theta**-half).repeat(1, 2)  # (T,D)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def plain(config: TrainConfig, vocab_size: int) -> tuple[Step, Step, str, int]:
    """The same four of the baseline: float32, every logit, 1/p_mask, AdamW."""
    model = Plain(vocab_size, config.length, **config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    text = torch.randint(4, vocab_size, (100_000,))

    def passes() -> None:
        starts = torch.randint(len(text) - config.length, (config.batch_size,))
        x0 = torch.stack([text[start : start + config.length] for start in starts])
        p_mask = (1 - 1e-3) * torch.rand(len(x0), 1).expand_as(x0) + 1e-3
        masked = torch.rand(x0.shape) < p_mask
        logits = model(torch.where(masked, 0, x0))
        nats = F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none").view_as(x0)
        (nats[masked] / p_mask[masked]).sum().div(x0.numel()).backward()

    def step() -> None:
        passes()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def passes_alone() -> None:
        passes()
        optimizer.zero_grad()

    return step, passes_alone, "float32", sum(p.numel() for p in model.parameters())


# ---- the race


def product(precision: str) -> Step:
    a, b = torch.randn(2, MATRIX, MATRIX).to(getattr(torch, precision))
    return lambda: a @ b


def arithmetic(passes: Step, n: int = 2) -> float:
    """Floating-point operations of the matrix products in a forward and backward pass, the mean of n."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # a fused kernel is not counted
        for _ in range(n):
            passes()
    return counter.get_total_flops() / n


def race(steps: dict[str, Step], seconds: float, turn: float = 0.5) -> dict[str, float]:
    """Seconds of one call of each: the median over turns of about `turn` seconds, three at least, taken in rotation."""
    calls, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        step()  # builds what kernels and optimisers keep
        start = time.perf_counter()
        step()
        calls[name] = max(1, round(turn / (time.perf_counter() - start)))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[name]) < 3:
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                step()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: median(found) for name, found in times.items()}


def measure(size: str, seconds: float, changes: dict, compile: bool) -> dict[str, dict]:
    config, vocab_size = SIZES[size]
    config = replace(config, **changes)
    torch.manual_seed(0)
    contestants = {"plain": plain(config, vocab_size), "ours": ours(config, vocab_size)}
    flops = {name: arithmetic(passes) for name, (_, passes, _, _) in contestants.items()}
    if compile:
        contestants["compiled"] = ours(replace(config, compile=True), vocab_size)
        flops["compiled"] = flops["ours"]
        start = time.perf_counter()
        for _ in range(WARM):
            contestants["compiled"][0]()
        compiling = time.perf_counter() - start
    steps = {name: step for name, (step, *_) in contestants.items()}
    steps |= {f"{name}, passes": passes for name, (_, passes, *_) in contestants.items()}
    steps |= {precision: product(precision) for _, _, precision, _ in contestants.values()}
    taken = race(steps, seconds)
    found = {}
    for name, (_, _, precision, parameters) in contestants.items():
        peak = 2 * MATRIX**3 / taken[precision]
        found[name] = {
            "precision": precision,
            "parameters": parameters,
            "milliseconds": 1000 * taken[name],
            "tokens_per_second": config.batch_size * config.length / taken[name],
            "matmul_gflop_per_step": flops[name] / 1e9,
            "peak_gflops": peak / 1e9,
            "share_of_peak": flops[name] / taken[name] / peak,
            "optimizer_share": 1 - taken[f"{name}, passes"] / taken[name],
            "speedup": taken["plain"] / taken[name],
            "speedup_of_passes": taken["plain, passes"] / taken[f"{name}, passes"],
        }
    if compile:
        found["compiled"]["seconds_of_compiling"] = compiling - WARM * taken["compiled"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of measuring, all sizes together")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), metavar="SIZE")
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw"), help="of ours (default: muon)")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"), help="of ours")
    parser.add_argument("--compile", action="store_true", help="let ours take part compiled too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = {"python": platform.python_version(), "torch": torch.__version__, "threads": args.threads}
    changes = {"optimizer": args.optimizer, "precision": args.precision}
    results = {}
    print("| Size | Step | Precision | ms | of it optimiser | Tokens/s | Peak, GFLOP/s | Share of peak | × plain |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        found = results[size] = measure(size, args.seconds / len(args.sizes), changes, args.compile)
        for name, r in found.items():
            times = f"{r['speedup']:.2f} ({r['speedup_of_passes']:.2f} without optimisers)"
            print(f"| {size} | {name} | {r['precision']} | {r['milliseconds']:.1f} | {r['optimizer_share']:.0%} | "
                  f"{r['tokens_per_second']:,.0f} | {r['peak_gflops']:,.0f} | {r['share_of_peak']:.0%} | "
                  f"{1 if name == 'plain' else times} |", flush=True)  # fmt: skip
        if args.compile:
            print(f"compiling took {found['compiled']['seconds_of_compiling']:.0f} s")
        if args.out:
            args.out.write_text(json.dumps(about | changes | {"sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
