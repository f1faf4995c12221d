"""LLaDA-8B's shape on llama.cpp, beside int4 and bfloat16 here: `python benchmarks/cpp.py [--layers 2]`.

Writes the model as a q4_0 file (no more than a matrix is in memory), loads it, and measures one evaluation of 160
columns of which the last 32 are the window, then one of the window alone with the prefix cache. Each way has a process
of its own. Needs the extra `cpp`, 5 GB of disk, and 17 GB of memory for bfloat16, which is left out if there is less.
Times are medians: of the clock, and of the processor's time over the number of threads, which a busy machine changes
less.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from minillada.decoding.llama_cpp import LlamaCpp
from minillada.model import LLaDA, ModelConfig
from minillada.sampler import predictor_of
from minillada.strategies import CACHES, Ask
from minillada.weights import convert
from minillada.weights.device import free_memory
from minillada.weights.quantize import quantize

SHAPE = {"vocab_size": 126464, "mask_id": 126336, "eos_id": 126081, "pad_id": 126081, "n_head": 32, "d_model": 4096,
         "d_ff": 12288}  # fmt: skip
LENGTH, WINDOW = 160, 32


def memory(key: str = "VmRSS") -> float:
    """GB in use by this process; VmHWM: the most so far. NaN where the system does not tell."""
    if not os.path.exists("/proc/self/status"):
        return float("nan")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) * 1024 / 1e9


def write(path: Path, layers: int, kind: str) -> dict:
    """Write random numbers as a file: matrices are cut from one pool of 2^26, repeated."""
    with torch.device("meta"):
        model = LLaDA(ModelConfig(n_layer=layers, **SHAPE))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    pool = torch.randn(2**26, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def read(name: str) -> Tensor:
        n = shapes[name].numel()
        return pool.repeat(-(-n // len(pool)))[:n].view(shapes[name]) if len(shapes[name]) > 1 else torch.ones(n)

    start, used = time.perf_counter(), time.process_time()
    convert.write(path, model, kind, read)
    seconds = time.perf_counter() - start
    return {"GB": path.stat().st_size / 1e9, "seconds": seconds, "cpu": time.process_time() - used,
            "most memory": memory("VmHWM")}  # fmt: skip


def assembled(layers: int, bits: str | None) -> LLaDA:
    """A model of the shape in bfloat16 or few bits, with the memory of its weights: one layer is made and copied."""
    small, torch_dtype = ModelConfig(n_layer=1, **SHAPE), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = LLaDA(small).eval().requires_grad_(False)
    torch.set_default_dtype(torch_dtype)
    model = quantize(model, bits) if bits else model
    for i in range(1, layers):
        model.layers.append(copy.deepcopy(model.layers[0]))
        model.layers[i].attn.layer = i
    model.config = ModelConfig(n_layer=layers, **SHAPE)
    return model


@torch.no_grad()
def measure(way: str, path: Path, layers: int, threads: int, repeats: int) -> dict:
    torch.set_num_threads(threads)
    start, before = time.perf_counter(), memory()
    if way == "llama.cpp":
        predict = LlamaCpp(path)
    else:
        predict = predictor_of(assembled(layers, None if way == "bfloat16" else way))
    found = {"load": time.perf_counter() - start}
    x = torch.randint(0, 100_000, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    x[:, -WINDOW:] = SHAPE["mask_id"]
    where, window = (x == SHAPE["mask_id"]).nonzero(as_tuple=True), slice(LENGTH - WINDOW, LENGTH)
    ask = Ask(x, where, window, torch.arange(1))
    cached = CACHES["prefix"]()(predict, x != SHAPE["mask_id"])
    cached(ask)  # the first evaluation of a window is of the whole, and builds what kernels keep
    for name, one in (("window", cached), ("whole", predict)):
        clocks, used = [], []
        for _ in range(repeats):
            clock, cpu = time.perf_counter(), time.process_time()
            one(ask)
            clocks.append(time.perf_counter() - clock)
            used.append((time.process_time() - cpu) / threads)
        found[name], found[f"{name}, cpu"] = statistics.median(clocks), statistics.median(used)
    return {**found, "memory": memory() - before, "most memory": memory("VmHWM")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kind", default="q4_0")
    parser.add_argument("--home", type=Path, help="where the file is made, or was made before (kept)")
    parser.add_argument("--ways", nargs="*", default=["llama.cpp", "int4", "bfloat16"])
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)  # what to do in this process, and the file
    args = parser.parse_args()
    if args.job:
        way, path = args.job[0], Path(args.job[1])
        task = (
            (path, args.layers, args.kind) if way == "write" else (way, path, args.layers, args.threads, args.repeats)
        )
        print(json.dumps((write if way == "write" else measure)(*task)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        path = (args.home or Path(temporary)) / f"random-{args.layers}-{args.kind}.gguf"
        for way in [*([] if path.exists() else ["write"]), *args.ways]:
            free, need = free_memory(torch.device("cpu")) / 1e9, (0.44 * args.layers + 2.1) * 1.06
            if way == "bfloat16" and free < need:
                print(f"bfloat16: left out, {free:.1f} GB of memory are free and {need:.1f} needed")
                continue
            options = [
                "--layers",
                args.layers,
                "--threads",
                args.threads,
                "--repeats",
                args.repeats,
                "--kind",
                args.kind,
            ]
            command = [sys.executable, __file__, *options, "--job", way, path]
            done = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout)
            print(f"{way:10}", ", ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
