"""Hold what the scripts share: exit codes, error messages, the sampler's options, run directories, and Ctrl-C."""

import argparse
import io
import os
import re
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import count
from pathlib import Path

from ..errors import BadInput, BadLuck, check_whole, in_a_line, meant
from ..model import ModelConfig
from ..sampler import SampleConfig, method_of
from ..strategies import Quota
from ..weights.shipped import SHIPPED, shipped

RUNS = Path("runs")

# option -> what it does. Types and defaults are SampleConfig's.
SAMPLING = {
    "gen_len": "new tokens (default: 128, or all that the length of a small model leaves)",
    "steps": "evaluations of the model, all windows together (default: one per token)",
    "block_len": "tokens of a window; windows are filled from left to right (default: 32)",
    "temperature": "0 takes the most probable token, 1 samples from the model",
    "remasking": "which holes are filled first: low_confidence, random, margin or entropy",
    "commit": "how many per step: quota, threshold:0.9, factor:1, entropy-bound:0.1, klass:0.9,0.01, ancestral or "
    "first-hitting; llada2:0.95,32, llada2.1:0.95,0.9, llada2.1-quality, llada2.1-speed or speculate",
    "revise": "take tokens back: remdm-cap:0.008, remdm-rescale:0.015, remdm-conf, random-remask or wino:0.6,0.9; each "
    "has a rule of its own for how many to commit",
    "cfg_scale": "guidance towards the prompt; 0 is off",
    "top_k": "draw among the k most probable tokens; 0 is off",
    "top_p": "draw among the most probable tokens that make up this probability",
    "cache": "compute less in each step: prefix, dual or refresh:50,7,0.25, which are approximations; block, which is "
    "exact and the default of block models",
    "block": "decode in blocks of so many tokens, which see only what stands before them (default: the model's)",
}
SWITCHES = {"ban_eos": "never write the end-of-text token", "defer_eos": "commit the end-of-text token last"}
TYPES = {field.name: field.type for field in fields(SampleConfig) if field.name in SAMPLING} | {
    "seed": int,
    "block": int,
}


def run(main: Callable[[], None]) -> None:
    """Call main; exit with 2 and one line for bad input or bad luck, 130 after Ctrl-C, 141 if nobody reads stdout."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is in the background of a shell script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `>&-`: what is written there goes nowhere
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    warned = lru_cache(lambda text: tell(f"warning: {text}"))  # each once
    warnings.showwarning = lambda message, *_: warned(str(message))
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):  # text that the terminal's encoding lacks must not end the program
            stream.reconfigure(errors=errors)
    if sys.stderr.isatty():
        print(end=" " * 10 + "\r", file=sys.stderr, flush=True)  # over the script's "loading…"
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # as of `sample.py | head`; the exit flushes stdout, which must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (BadInput, BadLuck) as error:
        sys.exit(complain(str(error)))
    except OSError as error:  # that nobody has put into words
        got = error.strerror or str(error) or type(error).__name__
        what = f"{error.filename or 'system'}: expected to use it, got {got}"
        sys.exit(complain(f"{what}; check the name, its permissions and the room on the disk"))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        sys.exit(complain(f"memory: expected enough, got {str(error)[:200]}; use a smaller dtype, length or batch"))
    except KeyboardInterrupt:
        sys.exit(130)


def complain(reason: str) -> int:
    """Print an error as one line on stderr; return the exit code that goes with it."""
    sys.stdout.flush()
    tell(f"error: {reason}")
    return 2


class Parser(argparse.ArgumentParser):
    """A parser that raises BadInput for a wrong option."""

    def __init__(self, description: str, examples: str) -> None:
        raw, width = argparse.RawDescriptionHelpFormatter, shutil.get_terminal_size().columns - 2
        about = "\n".join(textwrap.fill(line, width) for line in description.splitlines())
        super().__init__(description=about, epilog=examples, formatter_class=raw, allow_abbrev=False)

    def format_help(self) -> str:
        """Return the help, with a usage that leaves the options to the list below it."""
        there = [action for action in self._actions if not action.option_strings]
        places = [f"[{a.dest}]" if a.nargs == "?" else a.metavar or a.dest for a in there]
        self.usage = " ".join(["%(prog)s", *places, "[options]"])
        return super().format_help()

    def error(self, message: str) -> None:
        known = [option for action in self._actions for option in action.option_strings]
        typed = (word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--"))
        got, fix = message, f"see {self.prog} --help"
        if strange := next((word for word in typed if word not in known), ""):
            got, fix = f"no option {strange}", meant(strange, known, fix)
        raise BadInput(f"options: expected those of --help, got: {got}; {fix}")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of SampleConfig to a parser."""
    group = parser.add_argument_group("how to decode")
    for name, text in SAMPLING.items():
        group.add_argument("--" + name.replace("_", "-"), type=TYPES[name], metavar=TYPES[name].__name__, help=text)
    for name, text in SWITCHES.items():
        group.add_argument("--" + name.replace("_", "-"), action="store_true", default=None, help=text)
    group.add_argument(
        "--graphs", default="auto", help="auto: record evaluations on an NVIDIA GPU, which is faster; off"
    )
    group.add_argument("--seed", type=int, default=0, help="same seed, same machine, same tokens (default: 0)")


def sample_config(args: argparse.Namespace, model: ModelConfig, prompt_len: int, **defaults: object) -> SampleConfig:
    """Return the SampleConfig that was asked for; lengths not given are fitted to prompt and model. Raises BadInput."""
    given = {name: value for name in (*SAMPLING, *SWITCHES) if (value := getattr(args, name, None)) is not None}
    chosen = defaults | given
    for name in sorted({"gen_len", "block_len"} & chosen.keys()):
        check_whole(name, chosen[name], 1)
    method = method_of(SampleConfig(**{name: chosen[name] for name in ("commit", "revise") if name in chosen}))
    if "remasking" not in given and not isinstance(method, Quota):  # it goes by the score
        chosen["remasking"] = "low_confidence"
    in_blocks = chosen.get("block", model.block)
    if in_blocks:
        chosen.setdefault("cache", "none" if chosen.get("commit") == "speculate" else "block")
    left = model.max_len - prompt_len
    room = left if left < 256 else 128
    if room < 1:
        raise BadInput(f"prompt: expected fewer than {model.max_len} tokens, got {prompt_len}; shorten it")
    block = chosen.get("block_len", 32)
    if "block_len" not in given:  # a default gives way
        block = 1 if in_blocks else min(chosen.get("block_len", block), chosen.get("gen_len", room))
        chosen.pop("block_len", None)
    length = chosen.get("gen_len", max(room // block, 1) * block)
    check_whole("seed", args.seed, 0, 2**63 - 1)
    check_whole("gen_len", length, 1, model.max_len - prompt_len, "the model's length leaves no more")
    fitted = {"gen_len": length, "block_len": length if in_blocks or length % block else block, "steps": length}
    return SampleConfig(**fitted | chosen)


def runs() -> list[str]:
    """Return the run directories under runs/, the one that was written to last first."""
    found = [path for path in RUNS.glob("*/checkpoints") if path.is_dir() and (path.parent / "run.json").exists()]
    return [str(path.parent) for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def newest_run() -> str:
    """Return the run directory under runs/ that was written to last, or a shipped model if there is none."""
    if found := runs():
        return found[0]
    if shipped("tales") is None:
        raise BadLuck(f"run: expected a run directory under {RUNS}/, got none; train one with train_tiny.py")
    tell(f"no run under {RUNS}/ yet: this is the shipped model `tales` (train_tiny.py trains one of yours)")
    return "tales"


def here(name: str | None, hub: bool = False, others: Iterable[str] = tuple(SHIPPED), fix: str = "choose one") -> str:
    """Return the name of a model that is here: a path that exists, or one of `others`, the shipped models; with `hub`
    any name will do; for None the newest run. Raises BadLuck, which lists what is here, the most similar name first."""
    if name is None:
        return newest_run()
    if hub or name in others or os.path.lexists(name):
        return name
    known = sorted([*runs(), *others], key=lambda known: -SequenceMatcher(None, name, known).ratio())
    few = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
    expected = f"expected a model that is here ({few or 'none yet'}) or its path"
    raise BadLuck(f"{name or 'model'}: {expected}, got {'neither' if name else 'an empty name'}; {fix}")


def on_hub(name: str) -> bool:
    """Return whether a name looks like OWNER/NAME of the hub and not like a path of this machine."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not name.startswith(f"{RUNS}/")


def tell(text: str) -> None:
    """Print a line for the person at the terminal; standard output is for answers."""
    print(in_a_line(text), file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print a line on standard output, for a command whose answer is what it tells."""
    print(in_a_line(text), flush=True)


def fresh_run(name: str) -> Path:
    """Return runs/NAME-1, or the first such name that is free."""
    return next(path for n in count(1) if not (path := RUNS / f"{name}-{n}").exists())


class Interrupted:
    """A callable that is true after Ctrl-C or SIGTERM. It listens from its first call on, when there is something to
    save; before that, and at the second Ctrl-C, the program ends at once. told: whether to say so."""

    signal = 0

    def __init__(self, told: bool = True) -> None:
        self.told, self.listens = told, False

    def note(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.told:  # not by print, which must not be called within print
            line = "\nsaving… (Ctrl-C again to kill)\n"
            os.write(2, line.encode(sys.stderr.encoding or "utf-8", "replace"))

    def __call__(self) -> bool:
        if not self.listens:
            self.listens = True
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.note)
        return bool(self.signal)

    def code(self) -> int:
        """Return the exit code: 0, 130 after Ctrl-C or 143 after SIGTERM."""
        return 128 + self.signal if self.signal else 0
