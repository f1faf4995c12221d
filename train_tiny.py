"""Train a small masked-diffusion language model on a text, watching it learn to write."""

import sys
from pathlib import Path

from tqdm import tqdm

from minillada.cli import Interrupted, Parser, fresh_run, pick_device, run
from minillada.plots import loss_curve
from minillada.presets import PRESETS, TrainConfig
from minillada.sampler import SampleConfig, generate
from minillada.tokenizer import display
from minillada.train import TrainStep, train

LN2 = 0.6931471805599453
EXAMPLES = """examples:
  python train_tiny.py                                     three minutes on Python's own reference text
  python train_tiny.py --preset nano                       seconds, to see that everything works
  python train_tiny.py --data my_novel.txt --minutes 10    your own text
  python train_tiny.py --resume runs/docs-tiny-1           go on where a run was interrupted

presets: """ + ", ".join(name for name in PRESETS if "train" in PRESETS[name])


def parse() -> tuple[TrainConfig | None, Path | None]:
    p = Parser(__doc__, EXAMPLES)
    p.add_argument("--data", nargs="+", default=["docs"], help="docs, tales, shakespeare, or text files, "
                   "directories, JSONL (default: docs, the reference text inside every Python)")  # fmt: skip
    p.add_argument("--preset", default="tiny", help="size and recipe (default: tiny)")
    p.add_argument("--steps", type=int, help="optimiser steps (default: the preset's)")
    p.add_argument("--minutes", type=float, help="train for a time instead; the result then depends on the machine")
    p.add_argument("--tokenizer", help="characters, bytes or bpe:SIZE")
    p.add_argument("--batch-size", type=int, help="rows per step")
    p.add_argument("--length", type=int, help="tokens of context")
    p.add_argument("--lr", type=float, help="learning rate of the matrices (Muon)")
    p.add_argument("--process", help="how to noise: exact-count, bernoulli-mean or bernoulli (LLaDA's 1/t)")
    p.add_argument("--precision", help="auto (measured), float32 or bfloat16")
    p.add_argument("--eval-every", type=int, help="steps between validations and samples")
    p.add_argument(
        "--checkpoint-every", type=int, help="steps between checkpoints (default: one with every validation)"
    )
    p.add_argument("--out", type=Path, help="run directory (default: a fresh one under runs/)")
    p.add_argument("--resume", type=Path, metavar="RUN", help="go on with an interrupted run, with its own options")
    p.add_argument("--seed", type=int, default=0, help="same seed, same machine, same numbers (default: 0)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = vars(p.parse_args())
    if (resume := args.pop("resume")) is not None:
        return None, resume
    args["device"] = pick_device(args["device"])
    args["data"] = args["data"][0] if len(args["data"]) == 1 else tuple(args["data"])
    name = Path(args["data"] if isinstance(args["data"], str) else args["data"][0]).stem
    args["out"] = str(args["out"] or fresh_run(f"{name}-{args['preset']}"))
    return TrainConfig(**{name: value for name, value in args.items() if value is not None}), None


def introduce(step: TrainStep, where: str) -> None:
    c, text = step.model.config, step.text
    print(f"{where}: {len(text.train) + len(text.val):,} tokens of {text.characters_per_token:.2f} characters, "
          f"{c.vocab_size} kinds; the last tenth validates")  # fmt: skip
    print(f"model: {step.model.n_parameters():,} parameters, {c.n_layer} layers of width {c.d_model}")
    for notice in step.notices:
        print(notice)


def sample(step: TrainStep) -> str:
    """What it writes by now, on one line."""
    length = min(64, step.model.config.max_len)
    config = SampleConfig(length, length, length, temperature=0.7, remasking="random")
    return " ".join(display(step.tokenizer.decode(generate(step.model, [[]], config)[0])).split())


def main() -> None:
    config, resume = parse()
    where = resume or Path(config.out)
    interrupted = Interrupted()
    bar = loss = None
    for step in train(config, resume, stop=interrupted):
        if bar is None:
            introduce(step, str(where))
            bar = tqdm(total=step.config.steps, initial=step.step - 1, unit="step", mininterval=0.5, dynamic_ncols=True)
        nats = step.loss / step.text.characters_per_token
        loss = nats if loss is None else 0.95 * loss + 0.05 * nats
        bar.set_postfix_str(f"<= {loss:.2f} nats/char, {loss / LN2:.2f} bits/char, {step.tokens_per_second:,.0f} tok/s")
        bar.update()
        if step.bound is not None:
            bar.write(f"step {step.step}: validation <= {step.bound:.3f} nats/char   {sample(step)}")
    bar.close()
    print(f"validation: -log p <= {step.bound:.4f} nats = {step.bound / LN2:.4f} bits per character "
          f"after {step.step} steps, {step.seconds:.0f} s")  # fmt: skip
    print(f"saved in {where}" + (f", loss curve in {png}" if (png := loss_curve(where)) else ""))
    if interrupted():
        print(f"interrupted; go on with: python train_tiny.py --resume {where}")
    else:
        print(f"write with it: python sample.py {where} --prompt 'The'")
    sys.exit(interrupted.code())


if __name__ == "__main__":
    run(main)
