"""How fast is the sampler without any approximation? Beside it, in the same run, a plain loop over the whole canvas.

    python benchmarks/sampling.py                  13.8 M parameters, vocabulary 4,096, batch 1 and 8
    python benchmarks/sampling.py --vocabulary 126464 --layers 2 --windows 1

Both decode a prompt of 32 tokens and 128 new ones in windows of 32, one token a step and row, at temperature 0, and
must write the same tokens. The weights are random: the time does not depend on them. The loops take turns step by step;
the figures are medians over steps. `--out` adds them to a JSON file.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minillada import Canvas, LLaDA, ModelConfig, SampleConfig, stream

PROMPT = 32
CONFIG = SampleConfig(gen_len=128, steps=128, block_len=32, stop_at_eos=False)


class Timed(torch.nn.Module):
    """A model that adds up the time spent in it."""

    def __init__(self, model: LLaDA) -> None:
        super().__init__()
        self.model, self.config, self.seconds = model, model.config, 0.0

    def forward(self, *args, **kwargs) -> Tensor:
        start = time.perf_counter()
        logits = self.model(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return logits


@torch.no_grad()
def plain(model: torch.nn.Module, x: Tensor, config: SampleConfig) -> Iterator[Tensor]:
    """The textbook loop: logits, softmax and argmax of every position at every step, then row by row."""
    x, mask_id = x.clone(), model.config.mask_id
    prompt = x.shape[1] - config.gen_len
    for start in range(prompt, x.shape[1], config.block_len):
        for _ in range(config.steps * config.block_len // config.gen_len):
            logits = model(x)  # (B,T,V)
            p = logits.softmax(-1)
            logits[..., mask_id] = -torch.inf
            tokens = logits.argmax(-1)
            confidence = p.gather(-1, tokens[..., None]).squeeze(-1)
            confidence = confidence.masked_fill(x != mask_id, -torch.inf)
            confidence[:, start + config.block_len :] = -torch.inf
            for row in range(len(x)):
                best = confidence[row].topk(1).indices
                x[row, best] = tokens[row, best]
            yield x


def ours(model: torch.nn.Module, x: Tensor, config: SampleConfig) -> Iterator[Tensor]:
    return (step.x for step in stream(model, Canvas(x, torch.ones_like(x, dtype=torch.bool)), config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--windows", type=int, default=4, help="how many of the 4 windows to time")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = {"n_layer": args.layers, "d_model": args.width, "n_head": args.width // 64, "d_ff": args.width * 8 // 3}
    model = LLaDA(ModelConfig(vocab_size=args.vocabulary, mask_id=args.vocabulary - 1, **shape)).eval()
    torch.nn.init.normal_(model.head.weight)  # predictions far from ties
    halved = copy.deepcopy(model).bfloat16()
    about = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(f"{model.n_parameters() / 1e6:.1f} M parameters, {about}")
    results = []
    for batch in args.batch:
        x = torch.randint(args.vocabulary - 1, (batch, PROMPT + CONFIG.gen_len))
        x[:, PROMPT:] = model.config.mask_id
        random = replace(CONFIG, remasking="random")
        loops = {
            "plain loop, fp32": lambda m, x=x: plain(m, x, CONFIG),
            "ours, fp32": lambda m, x=x: ours(m, x, CONFIG),
            "ours, bf16": lambda m, x=x: ours(m, x, CONFIG),
            "ours, fp32, random order": lambda m, x=x, config=random: ours(m, x, config),
        }
        seconds = {name: [] for name in loops}  # of every step: all of it, and inside the model
        for _ in range(args.repeats):
            models = {name: Timed(halved if "bf16" in name else model) for name in loops}
            decoding = {name: loop(models[name]) for name, loop in loops.items()}
            written = {}
            for _ in range(32 * args.windows):
                for name, steps in decoding.items():
                    models[name].seconds, start = 0.0, time.perf_counter()
                    written[name] = next(steps)
                    seconds[name].append((time.perf_counter() - start, models[name].seconds))
            if not torch.equal(written["plain loop, fp32"], written["ours, fp32"]):
                raise SystemExit("the two loops wrote different tokens")
        base = statistics.median(total for total, _ in seconds["plain loop, fp32"])
        for name, runs in seconds.items():
            total, inside = (statistics.median(times) for times in zip(*runs, strict=True))
            figures = {"batch": batch, "loop": name, "ms_per_step": 1000 * total, "nfe": 128, "model_ms": 1000 * inside,
                       "sampler_ms": 1000 * (total - inside), "tokens_per_second": batch / total,
                       "times_plain": base / total}  # fmt: skip
            results.append(figures)
            print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v}" for k, v in figures.items()))
    if args.out:
        known = json.loads(args.out.read_text()) if args.out.exists() else {}
        known[f"vocabulary {args.vocabulary}, {args.layers} layers of width {args.width}"] = about | {"runs": results}
        args.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
