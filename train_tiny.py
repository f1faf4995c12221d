"""Train a small masked-diffusion language model on a text, watching it learn to write."""

import math
import os
import signal
import sys
from dataclasses import asdict, fields
from pathlib import Path

if __name__ == "__main__":  # importing PyTorch takes seconds
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C ends it at once; `run` listens later
    if sys.stderr and sys.stderr.isatty():
        print("loading…", end="\r", file=sys.stderr, flush=True)

from minillada.commands.cli import Interrupted, Parser, fresh_run, here, on_hub, run, say
from minillada.commands.progress import TrainingBar
from minillada.errors import BadInput, check_one_of
from minillada.sampler import SampleConfig, generate
from minillada.show.plots import loss_curve
from minillada.text.tokenizer import display
from minillada.training.config import CONFIGS, PRESETS, RunConfig, TrainConfig
from minillada.training.distributed import agree, processes, rank, together
from minillada.training.loggers import LOGGERS, make
from minillada.training.run import RunStep, train
from minillada.weights.device import pick_device

EXAMPLES = """examples:
  python train_tiny.py                  a few minutes on Python's own reference
  python train_tiny.py --preset nano    seconds, to see that everything works
  python train_tiny.py --data tales     little stories, without a download
  python train_tiny.py --data my_novel.txt --minutes 10          your own text
  python train_tiny.py --resume runs/docs-tiny-1    go on after an interruption
  python train_tiny.py --sft answers.jsonl --from runs/docs-tiny-1
                               teach it to answer: docs/assistant.md
  torchrun --standalone --nproc_per_node=8 train_tiny.py        on eight GPUs

presets: """ + ", ".join(name for name in PRESETS if "train" in PRESETS[name])


def options() -> Parser:
    """Return the parser of this script's options. One that is not given is None, and the config's default holds."""
    p = Parser(__doc__, EXAMPLES)
    p.add_argument("--data", nargs="+", help="docs (Python's own reference; the default), tales, shakespeare, or paths")
    p.add_argument("--preset", help="size and recipe (default: tiny)")
    p.add_argument("--steps", type=int, help="optimiser steps (default: the preset's)")
    p.add_argument("--minutes", type=float, help="train for a time instead; the result then depends on the machine")
    p.add_argument("--tokenizer", help="characters, bytes or bpe:SIZE")
    p.add_argument("--batch-size", type=int, help="rows per step")
    p.add_argument("--length", type=int, help="tokens of context")
    p.add_argument(
        "--block", type=int, metavar="N", help="write in blocks of N tokens (docs/blocks.md); 1: autoregression"
    )
    p.add_argument("--twin", type=float, metavar="SHARE", help="of the training, from left to right (default: 0.2)")
    p.add_argument("--rows", help="windows of the whole text (default), or documents: one in each row, with its end")
    p.add_argument("--optimizer", help="of the matrices: muon (default) or adamw")
    p.add_argument("--lr", type=float, help="its learning rate")
    p.add_argument("--errors", type=float, metavar="SHARE", help="of given tokens that are wrong and to be corrected")
    p.add_argument("--process", help="how to noise: exact-count, bernoulli-mean, bernoulli (LLaDA's), bernoulli-cosine")
    p.add_argument("--precision", help="float32, bfloat16 or auto: bfloat16 if the device has instructions for it")
    p.add_argument("--eval-every", type=int, help="steps between validations and samples")
    p.add_argument("--checkpoint-every", type=int, help="steps between checkpoints (default: every validation)")
    p.add_argument("--keep", type=int, help="last checkpoints to keep, beside the best (default: 3; 0: all)")
    p.add_argument("--out", type=Path, help="run directory (default: a fresh one under runs/)")
    p.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with a run, with its own options but for those given"
    )
    p.add_argument("--seed", type=int, help="same seed, same machine, same numbers (default: 0)")
    p.add_argument("--device", help="auto, cpu, cuda or mps (default: auto, or that of the run to resume)")
    p.add_argument("--accumulate", type=int, metavar="N", help="split a batch into N passes: less memory, same result")
    on, off = {"action": "store_true", "default": None}, {"action": "store_false", "default": None}
    p.add_argument("--recompute", **on, help="compute every layer twice: less memory, more time")
    p.add_argument("--compile", **on, help="use torch.compile")
    p.add_argument("--shard", **on, help="under torchrun: FSDP2 in place of DDP")
    p.add_argument("--log", help=f"{' or '.join(LOGGERS)}, besides log.jsonl")
    more = p.add_argument_group("to go on from a trained model (docs/assistant.md)")
    more.add_argument("--sft", metavar="DATA", help="teach it to answer: JSONL with prompt and answer, or messages")
    more.add_argument("--prefer", metavar="DATA", help="VRPO: JSONL with prompt, chosen and rejected")
    more.add_argument("--distil", metavar="DATA", help="learn to answer in fewer steps: JSONL as for --sft")
    more.add_argument("--from", dest="start", metavar="RUN", help="the run or model to begin with; with --block too")
    more.add_argument("--lora", type=int, metavar="RANK", help="train adapters, which are merged when saved")
    more.add_argument("--no-eos-padding", dest="eos_padding", **off, help="SFT: one end of text per answer")
    more.add_argument("--samples", type=int, metavar="N", help="VRPO: masking levels for each bound (default: 8)")
    more.add_argument("--masks", type=int, metavar="N", help="VRPO: masks at each of them (default: 1)")
    more.add_argument("--no-shared", dest="shared", **off, help="VRPO: other masks for the reference")
    more.add_argument("--beta", type=float, help="VRPO: of the preference loss (default: 0.2)")
    more.add_argument("--certainty", type=float, metavar="W", help="distil: weight of the entropy of right predictions")
    more.add_argument("--consistency", type=float, metavar="W", help="distil: weight of agreeing with the model's EMA")
    more.add_argument("--ema", type=float, help="distil: what of that average stays in a step (default: 0.99)")
    more.add_argument("--sft-share", type=float, help="VRPO: of SFT's loss on the chosen answers (default: 0.05)")
    more.add_argument("--reward", metavar="TASK", help="rewards (docs/few_steps.md): it answers a task of `tasks`")
    more.add_argument("--rollout-steps", type=int, metavar="N", help="rewards: evaluations for an answer (default: 4)")
    more.add_argument("--algorithm", help="rewards: rejection (default); ablations: diffu-grpo, wd1, just-grpo")
    more.add_argument("--group", type=int, metavar="N", help="rewards: answers to the same question (default: 1, or 8)")
    more.add_argument("--inner", type=int, metavar="N", help="rewards: steps that learn from one rollout (default: 4)")
    more.add_argument("--temperature", type=float, help="rewards: of rollouts (default: 0, or 1)")
    return p


def config_for(given: dict) -> RunConfig:
    """Return the config that options ask for, by field. Raises BadInput for those that do not go together."""
    tuned = {name: given.pop(name) for name in CONFIGS if name in given}  # options have the names of objectives
    if len(tuned) > 1:
        first, other = list(tuned)[:2]
        raise BadInput(f"{other}: expected none with --{first}, got {tuned[other]!r}; leave one of them out")
    (name,) = tuned or ("pretrain",)
    kind, data = CONFIGS[name], tuned.get(name)
    if tuned and "start" not in given:
        raise BadInput("from: expected a run or model directory to begin with, got none; add --from RUN")
    asked = f"--{name}" if tuned else "pre-training"
    allowed = {field.name for field in fields(kind)} - ({"data"} if tuned else set())
    if kind is TrainConfig and "block" not in given:
        allowed -= {"start"}
    for name in given.keys() - allowed:
        option = "from" if name == "start" else name
        asked += " without --block" * (option == "from")
        raise BadInput(f"{option}: expected none with {asked}, got {given[name]!r}; leave it out")
    data = [data] if tuned else given.pop("data", ["docs"])
    if "start" in given:
        here(given["start"], on_hub(given["start"]))
    name = f"{Path(data[0]).stem.replace(':', '')}-{kind.objective if tuned else given.get('preset', 'tiny')}"
    out = str(given.pop("out", None) or fresh_run(name))
    return kind(**given, data=data[0] if len(data) == 1 else tuple(data), out=out)


def announce(config: RunConfig | None, where: Path) -> None:
    """Say what is done before the first step, which can take a while."""
    what = "its data and its newest checkpoint"
    if config:
        data = config.data if isinstance(config.data, str) else ", ".join(config.data)
        learned = getattr(config, "tokenizer", None)
        what = data + (f", making a vocabulary of {learned}" if learned else f" and {config.start}")
    say(f"{where}: reading {what} …")


def introduce(step: RunStep, where: Path) -> None:
    """Say what is trained, and on what."""
    c, text = step.model.config, step.text
    say(f"{where}: {len(text.train) + len(text.val):,} tokens of {text.characters_per_token:.2f} characters, "
        f"{c.vocab_size} kinds; the last tenth validates")  # fmt: skip
    say(f"model: {step.model.n_parameters():,} parameters, {c.n_layer} layers of width {c.d_model}")


def sample(step: RunStep) -> str:
    """Return what the model writes by now, or how it answers a held-out prompt, on one line."""
    whole = getattr(step.config, "rows", "windows") == "documents"
    prompt = [step.tokenizer.eos_id] * whole if isinstance(step.config, TrainConfig) else step.text.prompt
    length = step.length - 1 if whole else min(64, step.length - len(prompt))
    config = SampleConfig(**{"gen_len": length, "steps": length, "block_len": length, **step.config.sampling})
    words = [id for id in prompt if id < step.model.config.embedding_size]  # and not patches of a picture
    return " ".join(display(step.tokenizer.decode(words + generate(step.model, [prompt], config)[0])).split())


def follow(config: RunConfig | None, resume: Path | None, moved: dict, log: str | None) -> int:
    """Train, and show how it goes. Return the exit code."""
    where = resume or Path(config.out)
    interrupted, bar, loss, figures = Interrupted(told=rank() == 0), None, None, ""
    announce(config, where)
    for step in train(config, resume, stop=interrupted, **moved):
        if bar is None:
            introduce(step, where)
            bar = TrainingBar(step.config, shown=rank() == 0)
            tell = make(log, where, asdict(step.config)) if log and rank() == 0 else lambda record: None
        for notice in step.notices:
            bar.write(notice)
        if math.isfinite(step.loss):
            loss = step.loss if loss is None else 0.95 * loss + 0.05 * step.loss
            means = step.config.units(loss, step.text.characters_per_token).split(", ")[0]
            figures = f"{means}, {step.tokens_per_second:,.0f} tok/s"
        tell(step.record())
        if step.bound is not None:
            bar.write(f"step {step.step}: validation {step.config.units(step.bound)}   {sample(step)}")
        bar.show(step.step, step.seconds, step.bound is not None, figures)
    bar.close()
    say(f"validation: {step.config.units(step.bound)} after {step.step} steps, {step.seconds:.0f} s; "
        f"best at step {step.best}")  # fmt: skip
    say(f"saved in {where}" + (f", loss curve in {png}" if rank() == 0 and (png := loss_curve(where)) else ""))
    (code,) = agree(interrupted.code())
    how = "" if isinstance(step.config, TrainConfig) else " --chat"
    say(f"interrupted; go on with: python train_tiny.py --resume {where}" if code else
        f"write with it: python sample.py {where}{how}")  # fmt: skip
    return int(code)


def main() -> None:
    with processes():
        with together():
            given = {name: value for name, value in vars(options().parse_args()).items() if value is not None}
            log, resume = given.pop("log", None), given.pop("resume", None)
            if log is not None:
                check_one_of("log", log, LOGGERS)
            if resume:
                here(str(resume), others=())
            if not resume or "device" in given:
                given["device"] = pick_device(given.get("device", "auto"))
            config = None if resume else config_for(given)
        raise SystemExit(follow(config, resume, given if resume else {}, log))


if __name__ == "__main__":
    run(main)
