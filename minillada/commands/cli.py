"""What the scripts share: exit codes, the sampler's options, the choice of device, and saying things."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from ..errors import BadInput, BadLuck, check_whole
from ..model import ModelConfig
from ..sampler import SampleConfig, method_of
from ..text.tokenizer import display

RUNS = Path("runs")

# option -> what it does. Types and defaults are SampleConfig's.
SAMPLING = {
    "gen_len": "new tokens (default: 128, or what the model's length leaves)",
    "steps": "evaluations of the model, all windows together (default: one per token)",
    "block_len": "tokens of a window; windows are filled from left to right (default: 32)",
    "temperature": "0 takes the most probable token, 1 samples from the model",
    "remasking": "which holes are filled first: low_confidence, random, margin or entropy",
    "commit": "how many per step: quota, threshold:0.9, factor:1, entropy-bound:0.1, "
    "klass:0.9,0.01, ancestral, first-hitting",
    "revise": "take tokens back: remdm-cap:0.008, remdm-rescale:0.015, remdm-conf, random-remask or wino:0.6,0.9; each "
    "has a rule of its own for how many to commit",
    "cfg_scale": "guidance towards the prompt; 0 is off",
    "top_k": "draw among the k most probable tokens; 0 is off",
    "top_p": "draw among the most probable tokens that make up this probability",
    "cache": "compute less in each step: prefix, dual or refresh:50,7,0.25; all three are approximations",
}
SWITCHES = {
    "ban_eos": "never write the end-of-text token",
    "defer_eos": "commit the end-of-text token last",
}


def run(main: Callable[[], None]) -> None:
    """Call main and exit: 0; 2 with one line for bad input or bad luck; 130 after Ctrl-C, 141 if nobody reads on."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):  # what is no text in the terminal's encoding ends no program
            stream.reconfigure(errors=errors)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        quiet_pipe()
        sys.exit(141)
    except (BadInput, BadLuck, OSError) as error:
        fail(str(error) or type(error).__name__)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        fail(f"memory: expected enough, got {str(error)[:200]}; use a smaller dtype, length or batch")
    except KeyboardInterrupt:
        sys.exit(130)


def complain(reason: str) -> None:
    """One line on stderr."""
    sys.stdout.flush()
    print("error:", " ".join(display(reason).split()), file=sys.stderr)


def fail(reason: str) -> None:
    complain(reason)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """One line for a wrong option, as for every other bad input."""

    def __init__(self, description: str, examples: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, epilog=examples, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str) -> None:
        raise BadInput(f"options: expected those of --help, got: {message}; see {self.prog} --help")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to decode")
    types = {field.name: field.type for field in fields(SampleConfig)}
    for name, text in SAMPLING.items():
        group.add_argument("--" + name.replace("_", "-"), type=types[name], metavar=types[name].__name__, help=text)
    for name, text in SWITCHES.items():
        group.add_argument("--" + name.replace("_", "-"), action="store_true", default=None, help=text)
    group.add_argument("--seed", type=int, default=0, help="same seed, same machine, same tokens (default: 0)")


def sample_config(args: argparse.Namespace, model: ModelConfig, prompt_len: int, **defaults: object) -> SampleConfig:
    """The SampleConfig that was asked for; lengths not given are fitted to the prompt and to the model."""
    given = {name: getattr(args, name) for name in (*SAMPLING, *SWITCHES) if getattr(args, name) is not None}
    chosen = {**defaults, **given}
    for name in sorted({"gen_len", "block_len"} & chosen.keys()):
        check_whole(name, chosen[name], 1)
    commit = chosen.get("commit", "quota")
    if "remasking" not in given and not method_of(commit, chosen.get("revise", "none")).blind:  # it goes by confidence
        chosen["remasking"] = "entropy" if commit.startswith("entropy-bound") else "low_confidence"
    room = min(128, model.max_len - prompt_len)
    if room < 1:
        raise BadInput(f"prompt: expected fewer than {model.max_len} tokens, got {prompt_len}; shorten it")
    block = chosen.get("block_len", min(32, chosen.get("gen_len", room)))
    chosen.setdefault("gen_len", max(room // block, 1) * block)
    chosen.setdefault("block_len", block if chosen["gen_len"] % block == 0 else chosen["gen_len"])
    chosen.setdefault("steps", chosen["gen_len"])
    check_whole("seed", args.seed, 0, 2**63 - 1)
    check_whole("gen_len", chosen["gen_len"], 1, model.max_len - prompt_len, "that is what the model's length leaves")
    return SampleConfig(**chosen)


def newest_run() -> Path:
    """The run directory under runs/ that was worked on last."""
    found = [path.parent for path in RUNS.glob("*/run.json") if (path.parent / "checkpoints").is_dir()]
    if not found:
        raise BadLuck(f"run: expected a run directory under {RUNS}/, got none; train one with train_tiny.py")
    return max(found, key=lambda path: (path / "checkpoints").stat().st_mtime)


def fresh_run(name: str) -> Path:
    """runs/NAME-1, or the first number that is free."""
    number = 1
    while (RUNS / f"{name}-{number}").exists():
        number += 1
    return RUNS / f"{name}-{number}"


class Interrupted:
    """After Ctrl-C or SIGTERM it is true, and code() the exit code; a second Ctrl-C kills."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self) -> bool:
        return self.signal is not None

    def code(self) -> int:
        return 128 + self.signal if self.signal else 0


def quiet_pipe() -> None:
    """Let `sample.py | head` end without a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
