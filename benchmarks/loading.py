"""How long the real sizes take to load, against reading the same bytes: `python benchmarks/loading.py [--layers 1]`.

Writes a checkpoint of random bfloat16 weights in the layout of LLaDA-8B (16.0 GB, six files) or LLaDA-MoE-7B-A1B
(14.7 GB), then loads it with a cold and with a warm page cache, each time in a process of its own, and lets the model
do one evaluation and a few sampling steps. Needs the disk and, on a CPU, the memory for it; `--layers 1` is small.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from minillada import files
from minillada.model import LLaDA, ModelConfig
from minillada.sampler import SampleConfig, generate
from minillada.weights import checkpoint
from minillada.weights.schemes import SCHEMES, SIDE, write_config

MODELS = {
    "llada-8b": dict(
        vocab_size=126464, mask_id=126336, eos_id=126081, pad_id=126081, n_layer=32, n_head=32, d_model=4096,
        d_ff=12288,
    ),
    "llada-moe": dict(
        vocab_size=157184, mask_id=156895, eos_id=156892, pad_id=156892, n_layer=16, n_head=16, d_model=2048,
        d_ff=8192, max_len=8192, rope_theta=50000.0, qk_norm=True, n_expert=64, n_expert_active=8, d_expert=1024,
    ),
}  # fmt: skip
SHARD = 3 * 10**9  # bytes of a file


def make(config: ModelConfig, home: Path, ours: bool) -> None:
    """Write the checkpoint file by file, with the memory of one. ours: with the SHA-256 that our own saves carry."""
    home.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = LLaDA(config).bfloat16()
    scheme, raw, side = write_config(config)
    plan = checkpoint.plan_tensors(model, SCHEMES[scheme])
    shards = checkpoint.group(plan, SHARD)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            shape = [sum(map(len, plan[name])), *plan[name][0].shape[1:]]
            tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
            if len(shape) == 1:
                tensors[name].fill_(1)
        save_file(tensors, home / file)
        print(f"wrote {file}: {(home / file).stat().st_size / 1e9:.2f} GB", flush=True)
    if len(shards) > 1:
        index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
        (home / checkpoint.INDEX).write_text(json.dumps(index))
    (home / "config.json").write_text(json.dumps(raw))
    if side:
        (home / SIDE).write_text(json.dumps(side))
    if ours:
        files.write_manifest(home)


def evict(home: Path) -> bool:
    """Take the files out of the page cache; False where the system has no way to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in home.glob("*.safetensors"):
        with open(path, "rb") as f:
            os.fsync(f.fileno())  # only clean pages can be dropped
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def read(home: Path) -> float:
    """Seconds to read every weight once, into one small buffer."""
    buffer, start = bytearray(1 << 24), time.perf_counter()
    for path in sorted(home.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    return time.perf_counter() - start


def measure(home: Path, device: str, steps: int) -> dict:
    """Load in this process; return seconds, peak bytes, and what using the model takes."""
    interpreter = peak_memory()
    start = time.perf_counter()
    model, _ = checkpoint.load(home, device=device)
    synchronise(device)
    found = {"load": time.perf_counter() - start, "host": peak_memory() - interpreter}
    if device.startswith("cuda"):
        found["device"] = torch.cuda.max_memory_allocated()
    if not steps:
        return found
    tokens = torch.arange(64, device=device)[None]
    with torch.no_grad():
        for name in ("first", "second"):  # the first one also builds what the kernels keep
            start = time.perf_counter()
            model(tokens)
            synchronise(device)
            found[name] = time.perf_counter() - start
    start = time.perf_counter()
    generate(model, [list(range(32))], SampleConfig(gen_len=32, block_len=32, steps=steps))
    found["sampling"] = time.perf_counter() - start
    return found


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_memory() -> int:
    """The most bytes that were resident in this process so far; 0 on Windows."""
    if os.path.exists("/proc/self/status"):  # getrusage would count what the parent had before the fork
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac


def in_a_process_of_its_own(home: Path, device: str, steps: int) -> dict:
    command = [sys.executable, __file__, "--measure", str(home), "--device", device, "--steps", str(steps)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="llada-8b")
    parser.add_argument("--layers", type=int, help="fewer than the model has, to try it out")
    parser.add_argument("--home", type=Path, help="where the checkpoint is made, or was made before (kept)")
    parser.add_argument("--ours", action="store_true", help="with SHA-256, as our own saves are")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=4, help="of sampling; 0: load only")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args.measure, args.device, args.steps)))
    config = ModelConfig(**MODELS[args.model] | ({"n_layer": args.layers} if args.layers else {}))
    with tempfile.TemporaryDirectory() as temporary:
        home = args.home or Path(temporary) / "model"
        if not (home / "config.json").exists():
            make(config, home, args.ours)
        size = checkpoint.check(home).n_bytes
        print(f"{args.model}, {config.n_layer} layers, {size / 1e9:.2f} GB, to {args.device}")
        in_a_process_of_its_own(home, args.device, 0)  # once, so that the libraries themselves are in the cache
        for cache in ("cold", "warm"):
            if cache == "cold" and not evict(home):
                print("cold: not measured, this system cannot drop files from its cache")
                continue
            if cache == "warm":
                read(home)
            bytes_alone = read(home)
            if cache == "cold":
                evict(home)
            found = in_a_process_of_its_own(home, args.device, args.steps if cache == "warm" else 0)
            print(
                f"{cache}: read {bytes_alone:.2f} s, load {found['load']:.2f} s = {found['load'] / bytes_alone:.2f} x; "
                f"peak on the host {found['host'] / size:.3f} x the weights",
                flush=True,
            )
        if args.steps:
            print(f"evaluation of 64 tokens: first {found['first']:.2f} s, second {found['second']:.2f} s")
            print(f"{args.steps} sampling steps, 32 new tokens: {found['sampling']:.2f} s")
        if "device" in found:
            print(f"peak on the device: {found['device'] / size:.3f} x the weights")


if __name__ == "__main__":
    main()
