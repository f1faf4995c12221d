"""Time a training step and a sampling loop beside other people's code, fetched as peers.md says, in one run.

    python benchmarks/peers.py --nanogpt PEERS/nanoGPT --threads 1
    python benchmarks/peers.py --before ../minillada-of-before --sizes "tiny, 8 × 128" --threads 1
    python benchmarks/peers.py --llada PEERS/LLaDA --fast-dllm PEERS/Fast-dLLM --threads 1

Whatever is named takes part: nanoGPT's training step with as many tokens, layers, heads and channels; the step of
another checkout of this project; the official sampling loop and Fast-dLLM's with a dual cache. Both loops call our
module, so that they differ from ours in what they ask it, and they must write the tokens that ours writes. Every
contestant has a process of its own, as some set up their memory, and they take turns until the time is up. A figure
is the median of its turns; with one thread it is the processor's time, so that what else runs does not count.
Nothing of the peers is part of this project. Races of ours against plain.py need none: training.py and sampling.py.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import multiprocessing
import platform
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import ModuleType

import numpy as np
import torch
from curves import clock
from sampling import CONFIG, PROMPT
from torch import Generator, Tensor, nn
from training import SIZES

from minillada import Canvas, LLaDA, ModelConfig, stream
from minillada.model import KVCache
from minillada.weights.device import bfloat16_instructions

Step = Callable[[], object]  # a sampling step returns the tokens
Contestant = tuple[Callable[..., Step], tuple]  # what makes a step, and its arguments


def module_at(path: Path, name: str, absent: tuple[str, ...] = ()) -> ModuleType:
    """Import a file, or a package's folder, of a peer under a name. absent: modules that only its demo needs."""
    for missing in absent:
        sys.modules[missing] = stand_in = types.ModuleType(missing)
        stand_in.AutoTokenizer = stand_in.AutoModel = stand_in.LLaDAModelLM = None
    file, inside = (path / "__init__.py", [str(path)]) if path.is_dir() else (path, None)
    if not file.exists():
        raise SystemExit(f"{file}: expected a peer's file, got none; fetch it as benchmarks/peers.md says")
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- turns -----------------------------------------------------------------------------------------------------------


def serve(pipe: Connection, threads: int, make: Callable[..., Step], arguments: tuple) -> None:
    """Be a contestant: take so many steps as are asked for; answer with the seconds of one, and the last result."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = make(*arguments)
    step()  # builds what kernels and optimisers keep
    pipe.send(None)
    while calls := pipe.recv():
        start = clock()
        for _ in range(calls):
            result = step()
        pipe.send(((clock() - start) / calls, result if isinstance(result, list) else None))


def race(contestants: dict[str, Contestant], seconds: float, threads: int, turn: float = 0.5) -> dict[str, float]:
    """Return the seconds of a step of each: the median over turns of about `turn` seconds, three at least. Those of the
    sampling loops that have a name with the same first word must write the same tokens."""
    start_process, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name, (make, arguments) in contestants.items():
        pipes[name], theirs = start_process.Pipe()
        processes.append(start_process.Process(target=serve, args=(theirs, threads, make, arguments), daemon=True))
        processes[-1].start()
        pipes[name].recv()

    def steps_of(name: str, calls: int) -> tuple[float, list | None]:
        pipes[name].send(calls)
        return pipes[name].recv()

    calls = {name: max(1, round(turn / steps_of(name, 1)[0])) for name in contestants}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    written: dict[str, list] = {}
    spent = 0.0
    while spent < seconds or len(times[name]) < 3:
        for name in contestants:
            taken, tokens = steps_of(name, calls[name])
            times[name].append(taken)
            spent += taken * calls[name]
            if tokens is not None and written.setdefault(name.split()[0], tokens) != tokens:
                raise SystemExit(f"{name}: expected the tokens that ours writes, got others")
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(0)
        process.join()
    return {name: median(found) for name, found in times.items()}


# ---- training --------------------------------------------------------------------------------------------------------


def ours(checkout: Path | None, size: str, optimizer: str, precision: str) -> Step:
    """Return a training step as a run takes it, by this checkout or another one."""
    package = "minillada" if checkout is None else module_at(checkout / "minillada", "before").__name__
    part = lambda name: importlib.import_module(f"{package}.{name}")
    model, train = part("model"), part("train")
    known, vocab_size = SIZES[size]
    config = part("training.config").TrainConfig(
        preset=known.preset, model=known.model, batch_size=known.batch_size, length=known.length, steps=10**6,
        optimizer=optimizer, precision=precision,
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(4, vocab_size, 100_000).astype(np.uint16)  # speed is the same for any text
    text = part("text.ids").Tokens(ids, ids, 1.0, 1.0, "")
    learner = model.LLaDA(model.ModelConfig(vocab_size=vocab_size, mask_id=0, max_len=config.length, **config.model))
    called = part("training.distributed").spread(learner, config)
    objective = part("training.pretraining").TextPretraining(text, config, mask_id=0)
    optimizers = part("training.optim").make_optimizers(learner, config)
    ways = train.Ways(progress=lambda step: 0.5)  # at the full rate
    steps = train.learn(called, optimizers, objective, config, Generator().manual_seed(0), ways=ways)
    return lambda: next(steps)


def nanogpts(checkout: Path, size: str, precision: str) -> Step:
    """Return a step of nanoGPT's loop: forward in autocast, backward, clipping, its AdamW."""
    peer, (config, vocab_size) = module_at(checkout / "model.py", "nanogpt"), SIZES[size]
    c = config.model
    with contextlib.redirect_stdout(None):
        gpt = peer.GPT(peer.GPTConfig(block_size=config.length, vocab_size=vocab_size, n_layer=c["n_layer"],
                       n_head=c["n_head"], n_embd=c["d_model"], dropout=0.0, bias=False))  # fmt: skip
        optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    text = torch.randint(vocab_size, (100_000,))

    def step() -> None:
        there = torch.randint(len(text) - config.length - 1, (config.batch_size, 1)) + torch.arange(config.length)
        with torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
            _, loss = gpt(text[there], text[there + 1])
        loss.backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def trainings(args: argparse.Namespace, size: str) -> dict[str, Contestant]:
    """Name the contestants of a size."""
    found: dict[str, Contestant] = {}
    for precision in args.precision:
        for optimizer in args.optimizer:
            found[f"ours, {optimizer}, {precision}"] = ours, (None, size, optimizer, precision)
            if args.before:
                found[f"before, {optimizer}, {precision}"] = ours, (args.before, size, optimizer, precision)
        if args.nanogpt:
            found[f"nanoGPT, {precision}"] = nanogpts, (args.nanogpt, size, precision)
    return found


# ---- sampling --------------------------------------------------------------------------------------------------------


class Theirs(nn.Module):
    """Answer the peers' loops with our module as they ask: for all logits, and for keys and values to be used again."""

    def __init__(self, model: LLaDA) -> None:
        super().__init__()
        self.model, self.device = model, torch.device("cpu")

    def forward(
        self, x: Tensor, attention_mask: None = None, use_cache: bool = False, past_key_values: KVCache | None = None,
        replace_position: Tensor | None = None,
    ) -> types.SimpleNamespace:  # fmt: skip
        cache = past_key_values or (KVCache() if use_cache else None)
        positions = None if replace_position is None else replace_position[0].nonzero().flatten()
        return types.SimpleNamespace(logits=self.model(x, positions=positions, cache=cache), past_key_values=cache)


def task(precision: str) -> tuple[LLaDA, Tensor]:
    """Return a model of 13.8 M random parameters with a vocabulary of 4,096, and a prompt (1,32): always the same."""
    torch.manual_seed(0)
    model = LLaDA(ModelConfig(vocab_size=4096, mask_id=4095, n_layer=6, d_model=384, n_head=6, d_ff=1024)).eval()
    nn.init.normal_(model.head.weight)  # predictions far from ties
    return model.to(getattr(torch, precision)), torch.randint(4095, (1, PROMPT))


def answers(cache: str, precision: str, tokens: int) -> Step:
    """Return our loop over the answer to a prompt, a token a step, in windows of 32."""
    model, prompt = task(precision)
    config = replace(CONFIG, cache=cache, gen_len=tokens, steps=tokens)

    def answer() -> list[list[int]]:
        x = torch.cat([prompt, torch.full((1, tokens), 4095)], 1)
        for step in stream(model, Canvas(x, torch.ones_like(x, dtype=torch.bool)), config):  # noqa: B007 (the last)
            pass
        return step.x.tolist()

    return answer


def their_answers(file: Path, function: str, precision: str, tokens: int) -> Step:
    """Return the loop of a peer's function over the same answer."""
    model, prompt = task(precision)
    generate = getattr(module_at(file, "peer", ("transformers", "model", "model.modeling_llada")), function)
    model, how = Theirs(model), {"steps": tokens, "gen_length": tokens, "block_length": 32, "mask_id": 4095}

    def answer() -> list[list[int]]:
        written = generate(model, prompt, **how)
        return (written if isinstance(written, Tensor) else written[0]).tolist()

    return answer


def samplings(args: argparse.Namespace) -> dict[str, Contestant]:
    """Name the contestants of sampling."""
    found: dict[str, Contestant] = {}
    for precision in args.precision:
        if args.llada:
            found[f"exact-{precision}: ours"] = answers, ("none", precision, args.tokens)
            official = args.llada / "generate.py", "generate", precision, args.tokens
            found[f"exact-{precision}: the official loop"] = their_answers, official
        if args.fast_dllm:
            found[f"dual-{precision}: ours"] = answers, ("dual", precision, args.tokens)
            dual = args.fast_dllm / "llada/generate.py", "generate_with_dual_cache", precision, args.tokens
            found[f"dual-{precision}: Fast-dLLM's"] = their_answers, dual
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--before", type=Path, help="another checkout of this project")
    parser.add_argument("--llada", type=Path, help="a checkout of ML-GSAI/LLaDA")
    parser.add_argument("--fast-dllm", type=Path, help="a checkout of NVlabs/Fast-dLLM")
    parser.add_argument("--sizes", nargs="+", default=["10.7 M, 16 × 256"], choices=list(SIZES), metavar="SIZE")
    parser.add_argument("--optimizer", nargs="+", default=["adamw", "muon"], choices=("adamw", "muon"))
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), help="(default: both, or float32 "
                        "on a processor without instructions for bfloat16)")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=128, help="of an answer: a multiple of 32")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each race")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    args = parser.parse_args()
    args.precision = args.precision or ["float32", "bfloat16"][: 2 if bfloat16_instructions("cpu") else 1]
    torch.set_num_threads(args.threads)
    results: dict = {"python": platform.python_version(), "torch": torch.__version__, "threads": args.threads}
    if args.nanogpt or args.before:
        for size in args.sizes:
            results[size] = race(trainings(args, size), args.seconds, args.threads)
            tokens = SIZES[size][0].batch_size * SIZES[size][0].length
            for name, taken in results[size].items():
                print(f"{size}: {name}: {1000 * taken:.1f} ms a step, {tokens / taken:,.0f} tokens/s", flush=True)
    if found := samplings(args):
        results["sampling"] = race(found, args.seconds, args.threads)
        for name, taken in results["sampling"].items():
            print(f"{name}: {1000 * taken / args.tokens:.2f} ms a token", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
