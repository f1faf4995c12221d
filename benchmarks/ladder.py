"""The speed ladder: what each rung of faster decoding brings on trained models, and what it costs in quality.

    python train_tiny.py --preset small --tokenizer bpe:4096 --batch-size 8 --length 160 --minutes 45 --out runs/docs
    python train_tiny.py --preset small --tokenizer bpe:4096 --batch-size 3 --length 544 --minutes 55 --out runs/long
    python benchmarks/ladder.py docs runs/docs
    python benchmarks/ladder.py long runs/long --prompts 3
    python benchmarks/ladder.py sums runs/sums

`docs` continues held-out text by as much as the model has room for after 32 tokens; `long` does so on fewer rungs.
`sums` trains a small model on lines of 16 additions first (for --minutes), unless its directory exists. For every
prompt the rungs decode one after the other in the same run, batch 1; time is the median over prompts, and with one
thread the processor's. Each command renews its part of docs/ladder.json, and docs/ladder.png.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from curves import clock
from sampling import CONFIG, PROMPT, plain_copy
from torch import nn

import minillada
from minillada import Canvas, LLaDA, ModelConfig, SampleConfig, Tokenizer, TrainConfig, log_likelihoods, stream
from minillada.diffusion import exact_count, model_bound, sample_t
from minillada.plain import generate
from minillada.text.corpora import read_text, training_part
from minillada.text.tasks import make_task
from minillada.train import rate
from minillada.training.config import PRESETS
from minillada.training.optim import make_optimizers

DOCS = Path(__file__).parents[1] / "docs"
RUNGS: dict[str, dict] = {
    "plain loop": {},
    "exact tricks": {},
    "dual cache": {"cache": "dual"},
    "entropy-bound 0.1": {"commit": "entropy-bound:0.1", "remasking": "entropy"},
    "klass": {"commit": "klass:0.9,0.01"},
    "factor 1": {"commit": "factor:1"},
    "threshold 0.9": {"commit": "threshold:0.9"},
    "threshold 0.9 + prefix cache": {"commit": "threshold:0.9", "cache": "prefix"},
    "threshold 0.9 + dual cache": {"commit": "threshold:0.9", "cache": "dual"},
    "threshold 0.9 + refresh": {"commit": "threshold:0.9", "cache": "refresh:50,7,0.25"},
    "threshold 0.9 + dual, bf16": {"commit": "threshold:0.9", "cache": "dual"},
    "threshold 0.5 + dual, bf16": {"commit": "threshold:0.5", "cache": "dual"},
    "threshold 0.5 + dual cache": {"commit": "threshold:0.5", "cache": "dual"},
    "threshold 0.3 + dual cache": {"commit": "threshold:0.3", "cache": "dual"},
    "threshold 0.2 + dual cache": {"commit": "threshold:0.2", "cache": "dual"},
}

LONG = ["plain loop", "exact tricks", "dual cache", "threshold 0.9 + dual cache", "threshold 0.9 + dual, bf16"]


def train_sums(directory: Path, minutes: float) -> None:
    """A small model that answers lines of 16 additions; only the answers are noised."""
    examples = make_task("sums:16", 30_000, 0, 1).train
    tokenizer = Tokenizer.characters([examples[0].text, "0123456789\n"])
    rows = torch.tensor(tokenizer.encode_batch([example.text + "\n" for example in examples]))
    maskable = (torch.arange(rows.shape[1]) >= len(examples[0].prompt)).expand(8, -1)
    torch.manual_seed(0)
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    model = LLaDA(
        ModelConfig(vocab_size=tokenizer.vocab_size, max_len=rows.shape[1], **ids, **PRESETS["tiny"]["model"])
    )
    config, rng = TrainConfig(minutes=minutes), torch.Generator().manual_seed(0)
    optimizers = make_optimizers(model, config)
    start = time.perf_counter()
    while (progress := (time.perf_counter() - start) / 60 / minutes) < 1:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * rate(progress, config)
        x0 = rows[torch.randint(len(rows), (8,), generator=rng)]
        noised = exact_count(x0, tokenizer.mask_id, sample_t(8, rng), rng, maskable)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model_bound(model, x0, noised).mean() / maskable[0].sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    print(f"sums: {loss.item():.4f} nats per character after {minutes} minutes")
    minillada.save(model, directory, tokenizer)


def decode(model: LLaDA, prompt: list[int], options: dict, config: SampleConfig, loop: bool) -> tuple[list, float, int]:
    """The new tokens, seconds, and evaluations of the model."""
    canvas = Canvas.continuation([prompt], config.gen_len, model.config)
    plain, start = plain_copy(model) if loop else None, clock()
    if loop:
        *_, x = generate(plain, canvas.x, config.block_len, config.steps)
        nfe = config.steps
    else:
        for step in stream(model, canvas, replace(config, **options)):  # noqa: B007
            pass
        x, nfe = step.x, step.nfe
    return x[0, len(prompt) :].tolist(), clock() - start, nfe


def climb(
    model: LLaDA, prompts: list[list[int]], config: SampleConfig, quality: Callable, rungs: Iterable[str] = RUNGS
) -> list[dict]:
    """Every rung for every prompt; quality(index of the prompt, answer) -> figures, whose means are reported."""
    runs, halved = {name: [] for name in rungs}, copy.deepcopy(model).bfloat16()
    for i, prompt in enumerate(prompts):
        for name in rungs:
            options = RUNGS[name]
            asked = halved if name.endswith("bf16") else model
            answer, seconds, nfe = decode(asked, prompt, options, config, name == "plain loop")
            runs[name].append((answer, seconds, nfe, quality(i, answer)))
        print(f"prompt {i + 1} of {len(prompts)}", end="\r", flush=True)
    table = []
    base = statistics.median(seconds for _, seconds, _, _ in runs["plain loop"])
    for name, results in runs.items():
        seconds = statistics.median(s for _, s, _, _ in results)
        pairs = [
            (a, b)
            for (x, *_), (y, *_) in zip(results, runs["plain loop"], strict=True)
            for a, b in zip(x, y, strict=True)
        ]
        changed = sum(a != b for a, b in pairs) / len(pairs)
        quality = {key: statistics.mean(q[key] for *_, q in results) for key in results[0][-1]}
        table.append({"rung": name, "seconds": seconds, "times_plain": base / seconds,
                      "nfe": statistics.mean(n for _, _, n, _ in results), "changed": changed, **quality})  # fmt: skip
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in table[-1].items()))
    return table


def docs(run: Path, n: int, rungs: Iterable[str] = RUNGS) -> list[dict]:
    """Prompts from the validation text. Quality: the share of tokens that are the text's own in their place, and nats
    per token of what was written, given the prompt, by the model itself."""
    model, tokenizer = minillada.load(run)
    length = model.config.max_len
    config = replace(CONFIG, gen_len=length - PROMPT, steps=length - PROMPT, ban_eos=True)
    text = "".join(read_text(json.loads((run / "run.json").read_text())["data"]))
    ids = tokenizer.encode(text[training_part(len(text)) :])
    rows = [ids[i : i + length] for i in range(0, len(ids) - length, (len(ids) - length) // n)][:n]
    prompts = [row[:PROMPT] for row in rows]

    def quality(i: int, answer: list[int]) -> dict:
        nats = -log_likelihoods(model, [(prompts[i], answer)], n_samples=8)[0].item() / len(answer)
        right = sum(a == b for a, b in zip(answer, rows[i][PROMPT:], strict=True)) / len(answer)
        return {"accuracy": right, "nats": nats}

    return climb(model, prompts, config, quality, rungs)


def sums(directory: Path, n: int) -> list[dict]:
    """Lines of 16 additions of pairs that were held out from training. Quality: the share of right sums."""
    model, tokenizer = minillada.load(directory)
    task = make_task("sums:16", 1, 0, n)
    prompts = tokenizer.encode_batch([example.prompt for example in task.test])

    def right(i: int, answer: list[int]) -> dict:
        return {"accuracy": task.check(task.test[i], tokenizer.decode(answer))}

    config = replace(CONFIG, gen_len=96, steps=96)  # the answer and the end of its line
    return climb(model, prompts, config, right)


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """A bar per rung, as long as it is fast, with its quality beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    says = {"docs": "{nats:.2f} nats a token", "sums": "{accuracy:.0%} right"}
    axes = figure.subplots(1, 2, sharey=True)
    for side, (name, says_what) in zip(axes, says.items(), strict=True):
        rungs = results[name]
        times = [rung["times_plain"] for rung in rungs]
        bars = side.barh([rung["rung"] for rung in rungs], times, color="tab:blue", alpha=0.7)
        side.bar_label(bars, [says_what.format(**rung) for rung in rungs], padding=4, fontsize=8)
        side.set(xscale="log", xlim=(0.9, 4 * max(times)), xlabel="times as fast as the plain loop", title=name)
        side.xaxis.set_major_formatter("{x:g}")
        side.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("docs", "long", "sums"))
    parser.add_argument("run", type=Path, help="a run of train_tiny.py; for sums, any model directory")
    parser.add_argument("--minutes", type=float, default=6.0, help="of training for sums, where there is no run yet")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--out", type=Path, default=DOCS / "ladder.json")
    args = parser.parse_args()
    if args.what == "sums":
        if not args.run.exists():
            train_sums(args.run, args.minutes)
        found = sums(args.run, args.prompts)
    else:
        found = docs(args.run, args.prompts, LONG if args.what == "long" else RUNGS)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    about = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    results = results | about | {args.what: found}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    if {"docs", "sums"} <= results.keys():
        draw(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
