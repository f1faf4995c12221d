"""Measure on an NVIDIA GPU what the documents say about it, and find what is wrong there.

    python benchmarks/gpu.py > gpu.jsonl               everything: minutes on an H100, 20 GB of its memory
    python benchmarks/gpu.py parity dense              only these parts
    python benchmarks/gpu.py --dry                     all of it in miniature on a CPU, to see that it runs

It prints one JSON object a line. "ms" is the median of groups of calls. "floor" is the least it could take, in
milliseconds: the bytes that must be read over the card's own copying speed, or the operations over its speed in a large
bfloat16 product, whichever is more; both are measured first, in the same run. "x" is ms over floor. A measurement that
failed has an "error", and then the exit code is 1. The large models have random weights, which the time does not show.
With --dry the figures mean nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from minillada import SampleConfig, TrainConfig, generate, log_likelihoods, stream, train
from minillada.decoding.graphs import Graphed, recorder
from minillada.model import KVCache, LLaDA, ModelConfig
from minillada.sampler import Canvas, Model, predictor_of
from minillada.strategies import CACHES, COMMITS, REVISIONS, SCORES, Ask
from minillada.training.config import IDS, PRESETS
from minillada.training.muon import Muon
from minillada.weights.quantize import Float8, Int4, Int8, PackedInt4, PackedInt8, kinds, memory, quantize

TOY = {"n_layer": 2, "n_head": 4, "d_model": 64, "d_ff": 128}
TOY_EXPERTS = {"n_expert": 8, "n_expert_active": 2, "d_expert": 32}
TOY_IDS = {"vocab_size": 512, "mask_id": 511, "eos_id": 510, "pad_id": 509}
WINDOW = 32


class Bench:
    """Hold the device, what its ceilings are, and what is printed."""

    def __init__(self, dry: bool) -> None:
        self.dry, self.device, self.part, self.failed = dry, "cpu" if dry else "cuda", "", 0
        self.bytes, self.operations = 1.0, 1.0  # per millisecond, at the most

    def say(self, what: str, **numbers: object) -> None:
        """Print a line; numbers that are None are left out."""
        short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in numbers.items() if v is not None}
        if numbers.get("floor") and "ms" in numbers:
            short["x"] = round(numbers["ms"] / numbers["floor"], 2)
        print(json.dumps({"part": self.part, "what": what, **short}), flush=True)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Say what fails in a line, and go on."""
        try:
            yield
        except Exception as error:
            self.failed += 1
            self.say(what, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if not self.dry:
            torch.cuda.empty_cache()

    def expect(self, what: str, right: bool, **numbers: object) -> None:
        """Say a result that is either right or an error."""
        self.failed += not right
        self.say(what, **numbers, error=None if right else "expected the same, got another")

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def ms(self, call: Callable[[], object], budget: float = 0.6) -> float:
        """Return the milliseconds of a call: the median of five groups, in which nothing waits but the call itself."""
        times: list[float] = []
        call(), call()
        for _ in range(2 if self.dry else 6):
            n = max(1, min(20, int(budget / 5 / times[0]))) if times else 1
            self.wait()
            start = time.perf_counter()
            for _ in range(1 if self.dry else n):
                call()
            self.wait()
            times.append((time.perf_counter() - start) / (1 if self.dry else n))
        return 1000 * statistics.median(times[1:])

    def waits(self, call: Callable[[], object]) -> int | None:
        """Return how often a call makes the host wait for the GPU."""
        if self.dry:
            call()
            return None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in seen)

    def gigabytes(self) -> float | None:
        """Return the most memory that was held since the last call."""
        if self.dry:
            return None
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak

    def floor(self, c: ModelConfig, rows: int, columns: int, keys: int, asked: int, size: float = 2.0) -> float:
        """Return the least milliseconds of an evaluation of rows x columns tokens that see `keys` places, with logits
        for `asked` of them. size: bytes of a weight. The last layer goes on with what is asked alone."""
        read = operations = 0.0
        tokens = rows * columns
        for layer in range(c.n_layer):
            on = asked if layer == c.n_layer - 1 else tokens
            kv, qo = 2 * c.d_model * c.n_kv_head * c.d_head, 2 * c.d_model * c.n_head * c.d_head
            stored = active = 3 * c.d_model * c.d_ff
            if c.n_expert and layer not in c.dense_layers:
                one = 3 * c.d_model * c.d_expert
                stored = c.n_expert * (1 - (1 - c.n_expert_active / c.n_expert) ** on) * one  # of an even routing
                active = c.n_expert_active * one
            read += (kv + qo + stored) * size + 4 * rows * keys * c.n_kv_head * c.d_head
            operations += 2 * tokens * kv + 2 * on * (qo + active) + 4 * on * keys * c.n_head * c.d_head
        read += c.d_model * c.embedding_size * size
        operations += 2 * asked * c.d_model * c.embedding_size
        return max(read / self.bytes, operations / self.operations)

    def model(self, name: str) -> LLaDA:
        """Return one of the published shapes in bfloat16, with random weights that are drawn on the device."""
        fields = PRESETS[name]["model"] | IDS[name]
        if self.dry:
            fields = fields | TOY | TOY_IDS | (TOY_EXPERTS if fields.get("n_expert") else {})
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(self.device):
                return LLaDA(ModelConfig(**fields)).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)

    def graphed(self, model: LLaDA) -> Graphed:
        def pretend(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
            out = run()
            return lambda: out.copy_(run()), out

        return Graphed(model, pretend if self.dry else recorder())

    def canvas(self, c: ModelConfig, rows: int, prompt: int, new: int) -> Canvas:
        x = torch.randint(0, c.vocab_size - 200, (rows, prompt + new), device=self.device)
        x[:, prompt:] = c.mask_id
        return Canvas(x, torch.ones_like(x, dtype=torch.bool))


def ceilings(b: Bench) -> None:
    """Say what the machine is, and the two speeds that floors are made of."""
    if not b.dry:
        p = torch.cuda.get_device_properties(0)
        b.say("device", name=p.name, gib=p.total_memory / 2**30, capability=f"{p.major}.{p.minor}")
    b.say("software", torch=torch.__version__, cuda=torch.version.cuda, cores=os.cpu_count(), dry=b.dry)
    with b.attempt("copying"):
        one = torch.ones(2**20 if b.dry else 2**32, dtype=torch.uint8, device=b.device)
        other = torch.empty_like(one)
        ms = b.ms(lambda: other.copy_(one))
        b.bytes = 2 * one.nbytes / ms
        b.say("copying, bytes read and written", ms=ms, tb_per_s=b.bytes / 1e9)
        del one, other
    with b.attempt("product"):
        n = 256 if b.dry else 8192
        one, other = (torch.randn(n, n, device=b.device, dtype=torch.bfloat16) for _ in range(2))
        ms = b.ms(lambda: one @ other)
        b.operations = 2 * n**3 / ms
        b.say(f"product of {n} x {n} in bfloat16", ms=ms, tflops=b.operations / 1e9)


ARCHITECTURES = {
    "dense": {},
    "grouped heads": {"n_kv_head": 2, "qk_norm": True, "qkv_bias": True, "tie_head": True},
    "experts": TOY_EXPERTS,
    "LLaDA2's experts": TOY_EXPERTS | {"router": "sigmoid", "n_expert_group": 2, "d_shared_expert": 32},
}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]


def ways() -> list[dict]:
    """List every way to decode: every name of every table, and what they are combined with."""
    found = [{"commit": name} for name in COMMITS] + [{"revise": name} for name in REVISIONS]
    found += [{"remasking": name} for name in SCORES] + [{"cache": name} for name in CACHES]
    found += [{"cfg_scale": 0.5}, {"cfg_scale": 0.5, "cache": "dual"}, {"ban_eos": True}, {"defer_eos": True}]
    return [*found, {"temperature": 0.7, "top_k": 5}, {"temperature": 0.7, "top_p": 0.8}]


def parity(b: Bench) -> None:
    """The same logits, tokens, likelihoods and losses on the GPU as on the CPU, in float32; the same bits twice."""
    torch.backends.cuda.matmul.allow_tf32 = False
    ids = {"vocab_size": 40, "mask_id": 39, "eos_id": 38, "pad_id": 37}
    for name, fields in ARCHITECTURES.items():
        host = LLaDA(ModelConfig(**(TOY | ids | fields))).eval().requires_grad_(False)
        host.init_weights(torch.Generator().manual_seed(0))
        if not host.config.tie_head:
            host.head.weight *= 20
        card = LLaDA(host.config).eval().requires_grad_(False)
        card.load_state_dict(host.state_dict())
        card.to(b.device)
        x = torch.randint(0, 39, (3, 24), generator=torch.Generator().manual_seed(0))
        with b.attempt(f"{name}, logits"):
            error = ((card(x.to(b.device)).cpu() - host(x)).norm() / host(x).norm()).item()
            b.expect(f"{name}, logits as on the CPU", error < 1e-4, relative_error=error)
        playing, same, twice, played, total, others = b.graphed(card), 0, 0, 0, 0, []
        for way in ways():
            with b.attempt(f"{name}, {way}"):
                config = SampleConfig(**({"gen_len": 16, "steps": 16, "block_len": 8, "stop_at_eos": False} | way))
                ours, total = generate(card, PROMPTS, config, 1), total + 1
                twice += ours == generate(card, PROMPTS, config, 1)
                played += ours == generate(playing, PROMPTS, config, 1)
                chance = config.temperature or config.remasking == "random" or way.get("revise", "").startswith("r")
                if chance or way.get("commit") in ("ancestral", "first-hitting"):
                    same += not any(host.config.mask_id in row for row in ours)  # other random numbers than a CPU's
                elif ours == generate(host, PROMPTS, config, 1):
                    same += 1
                else:
                    others.append(str(way))
        b.expect(f"{name}, tokens as on the CPU", same == total, same=same, of=total, others=others or None)
        b.expect(f"{name}, same tokens twice", twice == total, same=twice, of=total)
        b.expect(f"{name}, same tokens when recorded", played == total, same=played, of=total)
        with b.attempt(f"{name}, bits"):
            half, there = card.to(torch.bfloat16), x.to(b.device)
            first = half(there)
            b.expect(f"{name}, same bits in 20 calls", all(half(there).equal(first) for _ in range(20)))
    with b.attempt("likelihoods"):
        host = LLaDA(ModelConfig(**(TOY | ids))).eval()
        card = LLaDA(host.config).eval()
        card.load_state_dict(host.state_dict())
        pairs = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9])]
        error = (log_likelihoods(card.to(b.device), pairs)[0] - log_likelihoods(host, pairs)[0]).abs().max().item()
        b.expect("likelihoods as on the CPU", error < 1e-3, largest_error=error)
    base = {"preset": "nano", "steps": 4, "data": "tales", "tokenizer": "characters", "precision": "float32"}
    for extra in ({}, {"model": PRESETS["nano"]["model"] | {"n_expert": 4, "n_expert_active": 2, "d_expert": 32}}):
        with b.attempt(f"training {extra}"):
            one, other = ([s.loss for s in train(TrainConfig(**base | extra, device=d))] for d in ("cpu", b.device))
            error = max(abs(x / y - 1) for x, y in zip(one, other, strict=True))
            b.expect(f"losses of 4 steps {extra}", error < 1e-3, relative_error=error)


def evaluations(b: Bench, model: LLaDA, name: str, record: bool = True, size: float = 2.0) -> None:
    """Time an evaluation as the sampler asks for it: of the whole canvas, of a prefix's rest, of a window."""
    c = model.config
    for rows, total in ((1, 72),) if b.dry else ((1, 160), (1, 512), (1, 1024), (8, 160), (8, 512), (8, 1024)):
        prompt, x = total - 64 if b.dry else total // 2, None
        x = b.canvas(c, rows, prompt, total - prompt).x
        row = torch.arange(rows, device=b.device).repeat_interleave(WINDOW)
        column = torch.arange(WINDOW, device=b.device).repeat(rows)
        every, window = torch.arange(rows, device=b.device), slice(0, WINDOW)
        parts = {"whole": slice(0, total), "prefix": slice(prompt, total), "dual": slice(prompt, prompt + WINDOW)}
        predictors = {"": predictor_of(model)} | ({", recorded": b.graphed(model)} if record else {})
        for how, predict in predictors.items():
            cache = KVCache()
            whole = Ask(x, (row, column + prompt), slice(prompt, prompt + WINDOW), every)
            predict(whole._replace(positions=torch.arange(total, device=b.device)), cache)
            for part, columns in parts.items():
                with b.attempt(f"{name}, {rows} x {total}, {part}{how}"):
                    where = torch.arange(columns.start, columns.stop, device=b.device)
                    ask = whole
                    if part != "whole":
                        ask = Ask(x[:, columns], (row, column), window, every, positions=where)
                    held = None if part == "whole" else cache
                    call = lambda predict=predict, ask=ask, held=held: predict(ask, held)
                    least = b.floor(c, rows, columns.stop - columns.start, total, rows * WINDOW, size)
                    ms, waits = b.ms(call), b.waits(call)
                    b.say(f"{name}, {rows} x {total}, {part}{how}", ms=ms, floor=least, waits=waits, gb=b.gigabytes())
            del cache
        del predictors


def answers(b: Bench, model: Model, name: str, runs: list[tuple], rows: int = 1) -> None:
    """Time whole answers through the sampler. The first also has what libraries make ready."""
    for prompt, new, steps, cache in runs:
        what = f"{name}, {rows} answers of {new} after {prompt} in {steps} steps, {cache}"
        with b.attempt(what):
            config = SampleConfig(gen_len=new, steps=steps, block_len=WINDOW, cache=cache, stop_at_eos=False)
            times, canvas = [], b.canvas(predictor_of(model).config, rows, prompt, new)
            for _ in range(1 + 2 * (not b.dry)):
                b.wait()
                start = time.perf_counter()
                for last in stream(model, canvas, config):  # noqa: B007
                    pass
                b.wait()
                times.append(time.perf_counter() - start)
            waits = b.waits(lambda config=config, canvas=canvas: [None for _ in stream(model, canvas, config)])
            best, waits = min(times), waits and round(waits / last.nfe, 2)
            b.say(what, tokens_per_s=rows * new / best, ms_per_step=1000 * best / last.nfe, first_s=times[0],
                  waits_per_step=waits)  # fmt: skip


RUNS = [(32, 128, 128, "none"), (32, 128, 128, "prefix"), (32, 128, 128, "dual"), (768, 256, 96, "dual")]
DRY_RUNS = [(8, 64, 64, "dual")]


def dense(b: Bench) -> None:
    """The 8B in bfloat16: memory, evaluations, answers. 256 tokens in 96 steps: Fast-dLLM's tokens per evaluation."""
    model = b.model("llada-8b")
    b.say("8B", parameters=model.n_parameters(), weights_gb=memory(model) / 1e9, gb=b.gigabytes())
    evaluations(b, model, "8B")
    for name, writer in {"8B": model, "8B, recorded": b.graphed(model)}.items():
        answers(b, writer, name, DRY_RUNS if b.dry else RUNS)
        answers(b, writer, name, DRY_RUNS if b.dry else RUNS[2:3], rows=2 if b.dry else 8)


def moe(b: Bench) -> None:
    """LLaDA-MoE-7B-A1B in bfloat16, and one layer of it in the dtypes that have no fast product."""
    model = b.model("llada-moe-7b-a1b")
    b.say("MoE", parameters=model.n_parameters(), weights_gb=memory(model) / 1e9, gb=b.gigabytes())
    evaluations(b, model, "MoE")
    for name, writer in {"MoE": model, "MoE, recorded": b.graphed(model)}.items():
        answers(b, writer, name, DRY_RUNS if b.dry else RUNS[2:])
    layer = model.layers[0].ffn
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with b.attempt(f"experts in {dtype}"), torch.no_grad():
            x = torch.randn(WINDOW, model.config.d_model, device=b.device, dtype=dtype)
            layer.to(dtype)
            call = lambda x=x: layer(x)
            b.say(f"a layer of experts, {WINDOW} tokens, {dtype}", ms=b.ms(call), waits=b.waits(call))


def again(layer: torch.nn.Linear, kind: torch.nn.Module) -> torch.nn.Linear:
    """Return a layer like this one whose weight is computed again from few bits in every call."""
    small = deepcopy(layer)
    parametrize.register_parametrization(small, "weight", kind, unsafe=True)
    return small


def bits(b: Bench) -> None:
    """One of the 8B's matrices in few bits, by its product and computed again; then the 8B in few bits."""
    wide, narrow, copies = (1536, 1024, 1) if b.dry else (12288, 4096, 8)  # several, so that no cache holds them
    makers = {"int8 again": lambda layer: again(layer, Int8()), "int4 again": lambda layer: again(layer, Int4(64))}
    makers |= {"int4": lambda layer: PackedInt4(layer, 64)}
    makers |= {"int8": PackedInt8} if b.dry else {}
    makers |= {"fp8": Float8} if "fp8" in kinds(b.device) else {}
    with torch.device(b.device):
        layers = [torch.nn.Linear(narrow, wide, bias=False).to(torch.bfloat16) for _ in range(copies)]
    for layer in layers:
        layer.requires_grad_(False)
    for kind, make in {"bfloat16": lambda layer: layer, **makers}.items():
        with b.attempt(f"product in {kind}"):
            small, size = (
                [make(layer) for layer in layers],
                {"bfloat16": 2, "int4": 0.5625, "int4 again": 0.5625}.get(kind, 1),
            )
            for m in (1, 32, 256) if b.dry else (16, 32, 64, 160, 512):
                x = torch.randn(m, narrow, device=b.device, dtype=torch.bfloat16)
                truth, y = layers[0](x).float(), small[0](x).float()
                ms = b.ms(lambda x=x, small=small: [layer(x) for layer in small]) / copies
                least = max(size * wide * narrow / b.bytes, 2 * m * wide * narrow / b.operations)
                b.expect(f"{narrow} -> {wide}, {m} rows, {kind}", bool((y - truth).norm() < 0.2 * truth.norm()), ms=ms,
                         floor=least, relative_error=((y - truth).norm() / truth.norm()).item())  # fmt: skip
    del layers
    for kind, size in {"int8": 1.0, "int4": 0.5625, "fp8": 1.0}.items():
        if kind in kinds(b.device):
            with b.attempt(f"8B in {kind}"):
                model, start = b.model("llada-8b"), time.perf_counter()
                quantize(model, kind, b.device)
                b.wait()
                seconds, weights, _ = time.perf_counter() - start, memory(model) / 1e9, b.gigabytes()
                b.say(f"8B in {kind}", weights_gb=weights, quantized_in_s=seconds)
                evaluations(b, model, f"8B in {kind}", size=size)
                answers(b, b.graphed(model), f"8B in {kind}, recorded", DRY_RUNS if b.dry else RUNS[2:3])
                del model


def training(b: Bench) -> None:
    """A training step of the presets, Muon's part of it matrix by matrix and by shape, and two processes."""
    for preset in ("nano",) if b.dry else ("tiny", "tiny-moe", "small"):
        with b.attempt(f"training {preset}"):
            times, steps, start = [], 3 if b.dry else 60, time.perf_counter()
            config = TrainConfig(preset=preset, steps=steps, data="tales", device=b.device, eval_every=10**6)
            for step in train(config):  # noqa: B007
                b.wait()
                times.append(time.perf_counter() - start)
                start = time.perf_counter()
            ms = 1000 * statistics.median(times[len(times) // 2 : -1] or times)
            b.say(f"training {preset}", ms=ms, precision=step.config.precision, gb=b.gigabytes())
    sizes = {"8 x 128": [(128, 128)] * 16 + [(344, 128)] * 8 + [(128, 344)] * 4}
    sizes |= {} if b.dry else {"12 x 64": [(384, 384)] * 24 + [(1024, 384)] * 12 + [(384, 1024)] * 6}
    for size, shapes in sizes.items():
        with b.attempt(f"Muon, {size}"):
            matrices = [torch.nn.Parameter(torch.randn(shape, device=b.device)) for shape in shapes]
            for p in matrices:
                p.grad = torch.randn_like(p)
            dtype = torch.float32 if b.dry else torch.bfloat16
            ours = Muon([{"params": matrices}], 0.01, 0.1, dtype)
            alone = [Muon([{"params": [p]}], 0.01, 0.1, dtype) for p in matrices]
            one, other = b.ms(lambda alone=alone: [optimizer.step() for optimizer in alone]), b.ms(ours.step)
            b.say(f"Muon, matrices of {size}", one_by_one_ms=one, by_shape_ms=other, ratio=one / other)
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_tiny.py", "--preset", "nano"]
    for device in ("cpu",) if b.dry or torch.cuda.device_count() < 2 else ("cpu", "cuda"):
        with b.attempt(f"two processes on {device}"), tempfile.TemporaryDirectory() as home:
            options = ["--data", "tales", "--steps", "4", "--device", device, "--out", f"{home}/run"]
            environment = os.environ | {"MINILLADA_CACHE": home, "OMP_NUM_THREADS": "1"}
            done = subprocess.run([sys.executable, *two, *options], cwd=Path(__file__).parents[1], env=environment,
                                  capture_output=True, text=True, timeout=240)  # fmt: skip
            last = (done.stderr.strip().splitlines() or [""])[-1]
            b.expect(f"two processes on {device}", done.returncode == 0, last=last if done.returncode else None)


PARTS = {"ceilings": ceilings, "parity": parity, "dense": dense, "moe": moe, "bits": bits, "training": training}


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are named, or all; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--dry", action="store_true", help="in miniature on a CPU")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    b = Bench(args.dry)
    torch.manual_seed(0)
    for b.part in dict.fromkeys(["ceilings", *(args.parts or PARTS)]):
        start = time.perf_counter()
        with b.attempt(b.part), torch.set_grad_enabled(b.part == "training" or b.part == "parity"):
            PARTS[b.part](b)
        b.say("done", seconds=time.perf_counter() - start)
    return int(b.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
