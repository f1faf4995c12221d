"""Run a command, `python -m minillada NAME …`: call `main` of the module that COMMANDS names."""

import sys
from importlib import import_module

from .commands.cli import run
from .errors import check_one_of

COMMANDS = {  # name -> (module, what it does)
    "play": ("commands.play", "a story appears, a board solves itself: see what masked diffusion is"),
    "evaluate": ("commands.evaluate", "measure a model: a text, gaps, options, toy tasks"),
    "report": ("commands.report", "write a report card of a model: bound, samples, flawless stories, speed, curve"),
    "tasks": ("commands.tasks", "write a toy task with known answers"),
    "read": ("commands.read", "read the course in the browser: the code, with its prose and equations beside it"),
    "gguf": ("commands.gguf", "write a model as one GGUF file, for llama.cpp"),
    "app": ("commands.app", "open a model in the browser"),
    "lm_eval": ("measure.lm_eval", "run lm-evaluation-harness over a model"),
}


def main() -> None:
    """Hand the rest of the command line to the command that is named first."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m minillada COMMAND …; each has a --help")
        print("\n".join(f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()))
        return
    name = sys.argv.pop(1)
    check_one_of("command", name, COMMANDS)
    sys.argv[0] = f"python -m minillada {name}"
    import_module(f".{COMMANDS[name][0]}", __package__).main()


if __name__ == "__main__":
    run(main)
