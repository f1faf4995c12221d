"""See it think: a run of `Step`s drawn in the terminal while the text crystallises out of masks."""

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable
from typing import TextIO

from .sampler import Step
from .tokenizer import Tokenizer, display

HOLE = "░"
BOLD, DIM, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def pieces(step: Step, tokenizer: Tokenizer, row: int, start: int = 0) -> list[tuple[str, str]]:
    """A row of the canvas from column start on, as (kind, text): neighbouring tokens of a kind together, for one token
    may be half a letter.

    Kinds: "hole", "new" (committed in this step) and "old".
    """
    kinds = []
    for token, committed in zip(step.x[row, start:].tolist(), step.committed[row, start:].tolist(), strict=True):
        kind = "hole" if token == tokenizer.mask_id else "new" if committed else "old"
        if kinds and kinds[-1][0] == kind:
            kinds[-1][1].append(token)
        else:
            kinds.append((kind, [token]))
    return [(k, HOLE * len(ids) if k == "hole" else display(tokenizer.decode(ids))) for k, ids in kinds]


def columns(character: str) -> int:
    """How many columns of a terminal a character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def layout(parts: list[tuple[str, str]], width: int, colour: bool) -> list[str]:
    """The pieces as lines of at most `width` columns."""
    style = {"hole": DIM, "new": BOLD, "old": ""} if colour else {}
    lines, used = [""], 0
    for kind, text in parts:
        lines[-1] += style.get(kind, "")
        for character in text.expandtabs(4):
            if character == "\n" or used + columns(character) > width:
                lines[-1] += PLAIN if style.get(kind) else ""
                lines.append(style.get(kind, ""))
                used = 0
            if character != "\n":
                lines[-1] += character
                used += columns(character)
        lines[-1] += PLAIN if style.get(kind) else ""
    return lines


def watch(
    steps: Iterable[Step],
    tokenizer: Tokenizer,
    out: TextIO | None = None,
    row: int = 0,
    stages: int = 5,
    start: int = 0,
) -> Step:
    """Draw every step over the one before in a terminal, or a few stages one below the other elsewhere; the last step.

    start: the first column to draw. While it works, a canvas taller than the terminal shows its end; then all of it.
    """
    out = out or sys.stdout
    size = shutil.get_terminal_size()
    live = out.isatty() and os.environ.get("TERM") != "dumb"
    colour = live and "NO_COLOR" not in os.environ
    height, last, shown = 0, None, -1.0
    first_holes = None
    for step in steps:
        last = step
        holes = (step.x[row] == tokenizer.mask_id).sum().item()
        first_holes = first_holes or holes + step.committed[row].sum().item()
        done = 1 - holes / max(1, first_holes)
        if live:
            lines = layout(pieces(step, tokenizer, row, start), size.columns - 1, colour)[-(size.lines - 2) :]
            out.write(over(height) + "\n".join(lines) + "\n")
            height = len(lines)
        elif done - shown >= 1 / stages or (holes == 0 and shown < 1):
            text = "\n".join(layout(pieces(step, tokenizer, row, start), 10_000, False))
            out.write(f"--- step {step.step + 1}, {done:.0%} written\n{text}\n")
            shown = done
        out.flush()
    if live and last:
        out.write(over(height) + "\n".join(layout(pieces(last, tokenizer, row, start), size.columns - 1, False)) + "\n")
        out.flush()
    return last


def over(height: int) -> str:
    """What goes up so many lines and clears the screen from there."""
    return (f"\x1b[{height}F" if height else "") + "\x1b[J"
