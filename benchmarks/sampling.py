"""Time a step of the sampler without any approximation, beside plain.py with the same weights in the same run.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py                   13.8 M parameters, vocabulary 4,096, batch 1 and 8
    OMP_NUM_THREADS=1 python benchmarks/sampling.py --vocabulary 126464 --layers 2 --windows 1

Both decode a prompt of 32 tokens and 128 new ones in windows of 32, one token a step and row, at temperature 0, and
must write the same tokens. The weights are random: the time does not depend on them. The loops take turns step by step;
the figures are medians over steps, with one thread of the processor's time. `--out` adds them to a JSON file.
"""

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from curves import clock
from torch import Tensor

from minillada import Canvas, LLaDA, ModelConfig, SampleConfig, stream
from minillada.plain import Plain, generate

PROMPT = 32
CONFIG = SampleConfig(gen_len=128, steps=128, block_len=32, stop_at_eos=False)


class Timed(torch.nn.Module):
    """A model that adds up the time spent in it."""

    def __init__(self, model: torch.nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.model, self.config, self.mask_id, self.seconds = model, config, config.mask_id, 0.0

    def forward(self, *args, **kwargs) -> Tensor:
        start = clock()
        logits = self.model(*args, **kwargs)
        self.seconds += clock() - start
        return logits


def plain_copy(model: LLaDA) -> Plain:
    """Return plain.py's model with the weights of a LLaDA that has no switch of ModelConfig on."""
    c = model.config
    copied = Plain(c.embedding_size, c.mask_id, c.n_layer, c.n_head, c.d_model, c.d_ff, c.rope_theta)
    copied.load_state_dict(model.state_dict())
    return copied


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
    plain, halved = plain_copy(model), copy.deepcopy(model).bfloat16()
    about = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(f"{model.n_parameters() / 1e6:.1f} M parameters, {about}")
    results = []
    for batch in args.batch:
        x = torch.randint(args.vocabulary - 1, (batch, PROMPT + CONFIG.gen_len))
        x[:, PROMPT:] = model.config.mask_id
        random = replace(CONFIG, remasking="random")
        loops = {
            "plain.py, fp32": lambda m, x=x: generate(m, x, CONFIG.block_len, CONFIG.steps),
            "ours, fp32": lambda m, x=x: ours(m, x, CONFIG),
            "ours, bf16": lambda m, x=x: ours(m, x, CONFIG),
            "ours, fp32, random order": lambda m, x=x, config=random: ours(m, x, config),
        }
        seconds = {name: [] for name in loops}  # of every step: all of it, and inside the model
        for _ in range(args.repeats):
            asked = {"plain.py, fp32": plain, "ours, bf16": halved}
            models = {name: Timed(asked.get(name, model), model.config) for name in loops}
            decoding = {name: loop(models[name]) for name, loop in loops.items()}
            written = {}
            for _ in range(32 * args.windows):
                for name, steps in decoding.items():
                    models[name].seconds, start = 0.0, clock()
                    written[name] = next(steps)
                    seconds[name].append((clock() - start, models[name].seconds))
            if not torch.equal(written["plain.py, fp32"], written["ours, fp32"]):
                raise SystemExit("the two loops wrote different tokens")
        base = statistics.median(total for total, _ in seconds["plain.py, fp32"])
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
