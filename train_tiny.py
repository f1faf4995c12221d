"""Train a small masked-diffusion language model on a text, watching it learn to write."""

import math
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from minillada.commands.cli import Interrupted, Parser, fresh_run, run
from minillada.sampler import SampleConfig, generate
from minillada.show.plots import loss_curve
from minillada.text.tokenizer import display
from minillada.training.config import PRESETS, TrainConfig
from minillada.training.distributed import agree, processes, rank, together
from minillada.training.loggers import LOGGERS, make
from minillada.training.run import TrainStep, train
from minillada.training.sft import add_tuning, tuned
from minillada.weights.device import pick_device

EXAMPLES = """examples:
  python train_tiny.py                                     three minutes on Python's own reference text
  python train_tiny.py --preset nano                       seconds, to see that everything works
  python train_tiny.py --data my_novel.txt --minutes 10    your own text
  python train_tiny.py --resume runs/docs-tiny-1           go on where a run was interrupted
  torchrun --standalone --nproc_per_node=8 train_tiny.py   the same on 8 GPUs
  python train_tiny.py --sft answers.jsonl --from runs/docs-tiny-1    teach it to answer (docs/assistant.md)

presets: """ + ", ".join(name for name in PRESETS if "train" in PRESETS[name])


def parse() -> tuple[TrainConfig | None, Path | None, dict, str | None]:
    """What to train, or to resume with what changes; and the logger."""
    p = Parser(__doc__, EXAMPLES)
    p.add_argument("--data", nargs="+", help="docs (Python's own reference; the default), tales, shakespeare, or paths")
    p.add_argument("--preset", help="size and recipe (default: tiny)")
    p.add_argument("--steps", type=int, help="optimiser steps (default: the preset's)")
    p.add_argument("--minutes", type=float, help="train for a time instead; the result then depends on the machine")
    p.add_argument("--tokenizer", help="characters, bytes or bpe:SIZE")
    p.add_argument("--batch-size", type=int, help="rows per step")
    p.add_argument("--length", type=int, help="tokens of context")
    p.add_argument("--optimizer", help="of the matrices: muon (default) or adamw")
    p.add_argument("--lr", type=float, help="its learning rate")
    p.add_argument("--process", help="how to noise: exact-count, bernoulli-mean or bernoulli (LLaDA's 1/t)")
    p.add_argument("--precision", help="auto (measured), float32 or bfloat16")
    p.add_argument("--eval-every", type=int, help="steps between validations and samples")
    p.add_argument("--checkpoint-every", type=int, help="steps between checkpoints (default: every validation)")
    p.add_argument("--keep", type=int, help="last checkpoints to keep, beside the best (default: 3; 0: all)")
    p.add_argument("--out", type=Path, help="run directory (default: a fresh one under runs/)")
    p.add_argument("--resume", type=Path, metavar="RUN", help="go on with an interrupted run, with its own options")
    p.add_argument("--seed", type=int, default=0, help="same seed, same machine, same numbers (default: 0)")
    p.add_argument("--device", help="auto, cpu, cuda or mps (default: auto, or that of the run to resume)")
    p.add_argument("--accumulate", type=int, metavar="N", help="split a batch into N passes: less memory, same result")
    p.add_argument("--recompute", action="store_true", help="compute every block twice: less memory, more time")
    p.add_argument("--compile", action="store_true", help="use torch.compile")
    p.add_argument("--shard", action="store_true", default=None, help="under torchrun: FSDP2 in place of DDP")
    p.add_argument("--log", choices=list(LOGGERS), help="besides log.jsonl")
    add_tuning(p)
    args = vars(p.parse_args())
    log, resume = args.pop("log"), args.pop("resume")
    args["device"] = pick_device(args["device"] or "auto") if args["device"] or not resume else None
    if resume:
        return None, resume, {name: args[name] for name in ("device", "shard") if args[name] is not None}, log
    data, kind = (args := tuned(args))["data"], args["preset"] or args["objective"] or "tiny"
    args["out"] = str(args["out"] or fresh_run(f"{Path(data if isinstance(data, str) else data[0]).stem}-{kind}"))
    return TrainConfig(**{name: value for name, value in args.items() if value is not None}), None, {}, log


def introduce(step: TrainStep, where: str) -> None:
    c, text = step.model.config, step.text
    print(f"{where}: {len(text.train) + len(text.val):,} tokens of {text.characters_per_token:.2f} characters, "
          f"{c.vocab_size} kinds; the last tenth validates")  # fmt: skip
    print(f"model: {step.model.n_parameters():,} parameters, {c.n_layer} layers of width {c.d_model}")


def sample(step: TrainStep) -> str:
    """What it writes by now, or how it goes on from a held-out prompt, on one line."""
    prompt = getattr(step.text, "prompt", [])
    length = min(64, step.config.length - len(prompt))
    config = SampleConfig(length, length, length, temperature=0.7, remasking="random")
    return " ".join(display(step.tokenizer.decode(prompt + generate(step.model, [prompt], config)[0])).split())


def follow(config: TrainConfig | None, resume: Path | None, moved: dict, log: str | None) -> None:
    """Train, and show how it goes."""
    where = resume or Path(config.out)
    interrupted, bar, loss = Interrupted(), None, None
    for step in train(config, resume, stop=interrupted, **moved):
        if bar is None:
            introduce(step, str(where))
            look = {"unit": "step", "mininterval": 0.5, "dynamic_ncols": True, "disable": None if rank() == 0 else True}
            bar = tqdm(total=step.config.steps, initial=step.step - 1, **look)
            tell = make(log, where, asdict(step.config)) if log and rank() == 0 else lambda record: None
        for notice in step.notices:
            bar.write(notice)
        if math.isfinite(nats := step.loss / step.text.characters_per_token):
            loss = nats if loss is None else 0.95 * loss + 0.05 * nats
            bar.set_postfix_str(f"{step.config.units(loss)}, {step.tokens_per_second:,.0f} tok/s")
        bar.update()
        tell(step.record())
        if step.bound is not None:
            bar.write(f"step {step.step}: validation {step.config.units(step.bound)}   {sample(step)}")
    bar.close()
    bound, how = step.config.units(step.bound), "--chat" if step.config.start else "--prompt 'The'"
    print(f"validation: {bound} after {step.step} steps, {step.seconds:.0f} s; best at step {step.best}")
    print(f"saved in {where}" + (f", loss curve in {png}" if rank() == 0 and (png := loss_curve(where)) else ""))
    (code,) = agree(interrupted.code())
    print(f"interrupted; go on with: python train_tiny.py --resume {where}" if code else
          f"write with it: python sample.py {where} {how}")  # fmt: skip
    raise SystemExit(int(code))


def main() -> None:
    with processes():
        with together():
            options = parse()
        follow(*options)


if __name__ == "__main__":
    run(main)
