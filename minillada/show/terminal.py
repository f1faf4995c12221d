"""Draw a run of `Step`s in the terminal while the text appears out of masks."""

import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import TextIO

import torch

from ..sampler import Step
from ..text.tokenizer import Tokenizer, display

HOLE = "░"
PLAIN = "\x1b[0m"
# Only the eight colours that every terminal has, so that its own theme decides what they look like.
STYLE = {"hole": "\x1b[2m", "back": "\x1b[1;31m", "given": ""}
STYLE |= {"sure": "\x1b[32m", "fair": "\x1b[33m", "poor": "\x1b[35m"}
NEW, EDITED = "\x1b[1;7m", "\x1b[1;4;7m"  # on top of these
SURE, FAIR = 0.8, 0.4  # at least this probable
WORDS = re.compile(rf"\s|{HOLE}|[^\s{HOLE}]+")  # what a line is not broken within
INVISIBLE = {"Mn", "Me", "Cf"}  # categories of Unicode: marks on the letter before, joiners

Frame = tuple[list[int], list[float], list[int], list[bool]]  # see `pieces`
Kind = tuple[str, int]  # a key of STYLE, and whether committed in this step (1) over another token (2)


def frames(steps: Iterable[Step], row: int = 0, start: int = 0) -> Iterator[tuple[Step, Frame]]:
    """Yield each step with what there is to show of a row from column start on."""
    held = None
    for step in steps:
        held = torch.full_like(step.probability[row], torch.nan) if held is None else held
        over = step.committed[row] & ~held.isnan() & ~step.revised[row]
        held = held.masked_fill(step.revised[row], torch.nan)
        held = torch.where(step.committed[row], step.probability[row], held)
        columns = (step.x[row], held, step.committed[row].int() + over.int(), step.revised[row])
        yield step, tuple(tensor[start:].tolist() for tensor in columns)


def kind_of(token: int, sure: float, back: bool, mask_id: int) -> str:
    if token == mask_id:
        return "back" if back else "hole"
    if sure != sure:  # NaN
        return "given"
    return "sure" if sure >= SURE else "fair" if sure >= FAIR else "poor"


def pieces(
    tokens: list[int], held: list[float], new: list[int], back: list[bool], tokenizer: Tokenizer
) -> list[tuple[Kind, str]]:
    """Cut a row of the canvas into texts of one kind; neighbours stay together, as one token may be half a letter.
    held: each token's probability when it was committed; NaN for the given. new: 1 if committed now, 2 if over another
    token. back: taken back now."""
    parts = []
    kinds = [(kind_of(t, p, b, tokenizer.mask_id), n) for t, p, n, b in zip(tokens, held, new, back, strict=True)]
    for kind, places in groupby(range(len(tokens)), key=kinds.__getitem__):
        ids = [tokens[i] for i in places]
        parts.append((kind, HOLE * len(ids) if kind[0] in ("hole", "back") else display(tokenizer.decode(ids))))
    return parts


def columns(character: str) -> int:
    """Return how many columns of a terminal a character takes."""
    if unicodedata.category(character) in INVISIBLE and character != "\xad":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def layout(parts: list[tuple[Kind, str]], width: int, colour: bool) -> list[str]:
    """Break the pieces into lines of at most `width` columns: between words, on either side of a hole, and within a
    word only if it is longer than a line."""
    texts = [(STYLE[kind] + ("", NEW, EDITED)[new], text.expandtabs(4)) for (kind, new), text in parts]
    styles = iter([style for style, text in texts for _ in text])
    lines, used = [[]], 0  # of (style, character)
    for word in WORDS.findall("".join(text for _, text in texts)):
        size = sum(map(columns, word))
        whole = used + size > width >= size and not word.isspace()
        for i, (character, style) in enumerate(zip(word, styles, strict=False)):
            full = used + columns(character) > width
            if character == "\n" or (whole and i == 0) or (full and not character.isspace()):
                lines.append([])
                used = 0
            if character != "\n" and not (full and character.isspace()):  # a blank at the end of a line is not seen
                lines[-1].append((style, character))
                used += columns(character)
    runs = [groupby(line, itemgetter(0)) for line in lines]
    return ["".join(paint(style, "".join(c for _, c in run), colour) for style, run in line) for line in runs]


def paint(style: str, text: str, colour: bool) -> str:
    return f"{style}{text}{PLAIN}" if style and colour else text


def legend(width: int, done: bool) -> list[str]:
    """Return the line that says what the colours mean, or none where it does not fit."""
    words = [(STYLE["sure"], f"≥ {SURE:.0%}"), (STYLE["fair"], f"≥ {FAIR:.0%}"), (STYLE["poor"], "less")]
    signs = [
        (STYLE["hole"], f"{HOLE} to come"),
        (NEW, "new"),
        (STYLE["back"], f"{HOLE} taken back"),
    ]
    words = [(STYLE["hole"], "how sure:"), *words, *(signs if not done else [])]
    fits = sum(len(text) + 2 for _, text in words) - 2 <= width
    return ["  ".join(paint(style, text, True) for style, text in words)] if fits else []


def watch(
    steps: Iterable[Step], tokenizer: Tokenizer, out: TextIO | None = None,
    row: int = 0, stages: int = 5, start: int = 0, pause: float = 0.0, key: bool = True,
) -> Iterator[Step]:  # fmt: skip
    """Yield the same steps, each drawn: in a terminal over the one before, elsewhere a few stages one below the other.
    A legend says what the colours mean: how probable a token was when it was committed, which are new, which were taken
    back (key=False: no legend). NO_COLOR and TERM=dumb are honoured. start: the first column to draw. pause: seconds to
    hold each step. Until the last step, a canvas taller than the terminal shows its end alone."""
    out = out or sys.stdout
    live = out.isatty() and os.environ.get("TERM") != "dumb"
    colour = live and "NO_COLOR" not in os.environ
    height, frame, shown, at_first = 0, None, -1.0, 0
    for step, frame in frames(steps, row, start):
        if live:
            size = shutil.get_terminal_size()  # each time anew: a window may be resized
            meaning = legend(size.columns - 1, False) if colour and key else []
            room = max(1, size.lines - 2 - len(meaning))
            lines = layout(pieces(*frame, tokenizer), size.columns - 1, colour)[-room:]
            lines += [""] * (min(room, height - len(meaning)) - len(lines)) + meaning  # the legend never moves up
            out.write(over(height) + "\n".join(lines) + "\n")
            height = len(lines)
        else:
            holes = (step.x[row] == tokenizer.mask_id).sum().item()
            at_first = at_first or holes + step.committed[row].sum().item()
            done = 1 - holes / max(1, at_first)
            if done - shown >= 1 / stages or (holes == 0 and shown < 1):
                text, shown = "\n".join(layout(pieces(*frame, tokenizer), 10_000, False)), done
                out.write(f"--- step {step.step + 1}, {done:.0%} written\n{text}\n")
        out.flush()
        time.sleep(pause if live else 0)
        yield step
    if live and frame is not None:
        tokens, held, new, back = frame
        last = layout(pieces(tokens, held, [False] * len(new), back, tokenizer), size.columns - 1, colour)
        out.write(over(height) + "\n".join(last + (legend(size.columns - 1, True) if colour and key else [])) + "\n")
        out.flush()


def over(height: int) -> str:
    """Return what moves up so many lines and clears the screen from there."""
    return (f"\x1b[{height}F" if height else "") + "\x1b[J"
