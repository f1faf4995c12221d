"""Draw boards (Sudoku) that fill cell by cell, one or several beside each other, in a terminal."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from math import isqrt
from typing import TextIO

from ..sampler import Step
from ..text.tokenizer import Tokenizer
from .terminal import HOLE, NEW, PLAIN, STYLE, Frame, frames, kind_of, over


def board_lines(cells: Sequence[tuple[str, str]], colour: bool = True) -> list[str]:
    """Return the lines of a square board; a cell is (what stands in it, how a terminal styles it: "" or a sequence)."""
    side = isqrt(len(cells))
    box = isqrt(side)
    rule = lambda left, middle, right: left + middle.join(["─" * (2 * box + 1)] * box) + right
    found = [rule("┌", "┬", "┐")]
    for r in range(side):
        row = [
            f"{style}{text}{PLAIN}" if style and colour else text for text, style in cells[side * r : side * r + side]
        ]
        found.append("│" + "│".join(f" {' '.join(row[b : b + box])} " for b in range(0, side, box)) + "│")
        if (r + 1) % box == 0:
            found.append(rule("├", "┼", "┤") if r + 1 < side else rule("└", "┴", "┘"))
    return found


def cells_of(frame: Frame, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Return the cells of a frame of `terminal.frames`: holes are blocks, what was committed now is reversed."""
    cells = []
    for token, p, new, back in zip(*frame, strict=True):
        kind = kind_of(token, p, back, tokenizer.mask_id)
        text = HOLE if token == tokenizer.mask_id else tokenizer.token(token)
        cells.append((text, "\x1b[1m" if kind == "given" else STYLE[kind] + NEW * new))
    return cells


def watch_boards(
    runs: Sequence[Iterator[Step]], titles: Sequence[str], tokenizer: Tokenizer, start: int = 0,
    out: TextIO | None = None, pause: float = 0.0,
) -> list[list[Step]]:  # fmt: skip
    """Draw boards side by side while each is filled, in a terminal over the ones before, elsewhere the last ones alone.
    Return the steps of each. start: the column where the boards' cells begin; pause: seconds to hold each picture."""
    out = out or sys.stdout
    live = out.isatty() and os.environ.get("TERM") != "dumb"
    colour, height, kept = live and "NO_COLOR" not in os.environ, 0, [[] for _ in runs]
    shown: list[Frame | None] = [None] * len(runs)
    for both in zip_longest(*(frames(run, start=start) for run in runs)):
        for i, pair in enumerate(both):
            if pair is None:  # this board is full: nothing is new in it
                tokens, held, new, back = shown[i]
                shown[i] = tokens, held, [False] * len(new), back
            else:
                kept[i].append(pair[0])
                shown[i] = pair[1]
        if live:
            lines = beside([board_lines(cells_of(frame, tokenizer), colour) for frame in shown], titles)
            out.write(over(height) + "\n".join(lines) + "\n")
            height = len(lines)
            out.flush()
            time.sleep(pause)
    last = [
        board_lines(cells_of((*frame[:2], [False] * len(frame[2]), frame[3]), tokenizer), colour) for frame in shown
    ]
    out.write(over(height) * live + "\n".join(beside(last, titles)) + "\n")
    out.flush()
    return kept


def beside(boards: Sequence[list[str]], titles: Sequence[str]) -> list[str]:
    """Put boards of equal height side by side, each under its title."""
    width = max(len(boards[0][0]), *map(len, titles)) + 4
    gap = " " * (width - len(boards[0][0]))
    return [
        "".join(f"{title:<{width}}" for title in titles).rstrip(),
        *(gap.join(row).rstrip() for row in zip(*boards, strict=True)),
    ]
