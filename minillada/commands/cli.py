"""Hold what the scripts share: exit codes, error messages, the sampler's options, run directories, and Ctrl-C."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import count
from pathlib import Path

from ..errors import BadInput, BadLuck, check_whole
from ..model import ModelConfig
from ..sampler import SampleConfig, method_of
from ..strategies import Quota
from ..text.tokenizer import display

RUNS = Path("runs")

# option -> what it does. Types and defaults are SampleConfig's.
SAMPLING = {
    "gen_len": "new tokens (default: 128, or what the model's length leaves)",
    "steps": "evaluations of the model, all windows together (default: one per token)",
    "block_len": "tokens of a window; windows are filled from left to right (default: 32)",
    "temperature": "0 takes the most probable token, 1 samples from the model",
    "remasking": "which holes are filled first: low_confidence, random, margin or entropy",
    "commit": "how many per step: quota, threshold:0.9, factor:1, entropy-bound:0.1, klass:0.9,0.01, ancestral or "
    "first-hitting",
    "revise": "take tokens back: remdm-cap:0.008, remdm-rescale:0.015, remdm-conf, random-remask or wino:0.6,0.9; each "
    "has a rule of its own for how many to commit",
    "cfg_scale": "guidance towards the prompt; 0 is off",
    "top_k": "draw among the k most probable tokens; 0 is off",
    "top_p": "draw among the most probable tokens that make up this probability",
    "cache": "compute less in each step: prefix, dual or refresh:50,7,0.25; all three are approximations",
}
SWITCHES = {"ban_eos": "never write the end-of-text token", "defer_eos": "commit the end-of-text token last"}
TYPES = {field.name: field.type for field in fields(SampleConfig) if field.name in SAMPLING} | {"seed": int}


def run(main: Callable[[], None]) -> None:
    """Call main; exit with 2 and one line for bad input or bad luck, 130 after Ctrl-C, 141 if nobody reads stdout."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):  # text that the terminal's encoding lacks must not end the program
            stream.reconfigure(errors=errors)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # as of `sample.py | head`; the exit flushes stdout, which must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (BadInput, BadLuck, OSError) as error:
        sys.exit(complain(str(error) or type(error).__name__))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        sys.exit(complain(f"memory: expected enough, got {str(error)[:200]}; use a smaller dtype, length or batch"))
    except KeyboardInterrupt:
        sys.exit(130)


def complain(reason: str) -> int:
    """Print an error as one line on stderr; return the exit code that goes with it."""
    sys.stdout.flush()
    print("error:", " ".join(display(reason).split()), file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """A parser that raises BadInput for a wrong option."""

    def __init__(self, description: str, examples: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, epilog=examples, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str) -> None:
        raise BadInput(f"options: expected those of --help, got: {message}; see {self.prog} --help")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of SampleConfig to a parser."""
    group = parser.add_argument_group("how to decode")
    for name, text in SAMPLING.items():
        group.add_argument("--" + name.replace("_", "-"), type=TYPES[name], metavar=TYPES[name].__name__, help=text)
    for name, text in SWITCHES.items():
        group.add_argument("--" + name.replace("_", "-"), action="store_true", default=None, help=text)
    group.add_argument("--seed", type=int, default=0, help="same seed, same machine, same tokens (default: 0)")


def sample_config(args: argparse.Namespace, model: ModelConfig, prompt_len: int, **defaults: object) -> SampleConfig:
    """Return the SampleConfig that was asked for; lengths not given are fitted to prompt and model. Raises BadInput."""
    given = {name: getattr(args, name) for name in (*SAMPLING, *SWITCHES) if getattr(args, name) is not None}
    chosen = defaults | given
    for name in sorted({"gen_len", "block_len"} & chosen.keys()):
        check_whole(name, chosen[name], 1)
    method = method_of(SampleConfig(**{name: chosen[name] for name in ("commit", "revise") if name in chosen}))
    if "remasking" not in given and not isinstance(method, Quota):  # it goes by the score
        chosen["remasking"] = "low_confidence"
    room = min(128, model.max_len - prompt_len)
    if room < 1:
        raise BadInput(f"prompt: expected fewer than {model.max_len} tokens, got {prompt_len}; shorten it")
    block = chosen.get("block_len", min(32, chosen.get("gen_len", room)))
    length = chosen.get("gen_len", max(room // block, 1) * block)
    check_whole("seed", args.seed, 0, 2**63 - 1)
    check_whole("gen_len", length, 1, model.max_len - prompt_len, "the model's length leaves no more")
    fitted = {"gen_len": length, "block_len": length if length % block else block, "steps": length}
    return SampleConfig(**fitted | chosen)


def newest_run() -> Path:
    """Return the run directory under runs/ that was written to last. Raises BadLuck."""
    found = [path for path in RUNS.glob("*/checkpoints") if path.is_dir() and (path.parent / "run.json").exists()]
    if not found:
        raise BadLuck(f"run: expected a run directory under {RUNS}/, got none; train one with train_tiny.py")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def fresh_run(name: str) -> Path:
    """Return runs/NAME-1, or the first such name that is free."""
    return next(path for n in count(1) if not (path := RUNS / f"{name}-{n}").exists())


class Interrupted:
    """A callable that is true after Ctrl-C or SIGTERM; a second Ctrl-C ends the program at once."""

    signal = 0

    def __init__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self) -> bool:
        return bool(self.signal)

    def code(self) -> int:
        """Return the exit code: 0, 130 after Ctrl-C or 143 after SIGTERM."""
        return 128 + self.signal if self.signal else 0
