"""The two ways a user's request can fail, each with a one-line message: `WHAT: expected E, got G; FIX`.

Scripts turn both into `error: ...` on stderr and exit code 2. Anything else that is raised is a bug of ours.
"""

import math
from collections.abc import Iterable


class BadInput(ValueError):
    """What the user gave cannot be used: an option, a text, a file's content."""


class BadLuck(OSError):
    """The environment failed: a missing file, a full disk, no network, too little memory."""


def check_whole(what: str, value: object, low: int, high: float = math.inf, fix: str = "mend it") -> None:
    """Raise BadInput unless value is an int (a bool is none) from low to high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        span = f">= {low}" if high == math.inf else f"from {low} to {high}"
        raise BadInput(f"{what}: expected a whole number {span}, got {value!r}; {fix}")


TINY = 1e-300  # as a lower limit: more than zero


def check_number(what: str, value: object, low: float = 0.0, high: float = 1e300, fix: str = "mend it") -> None:
    """Raise BadInput unless value is a finite int or float from low to high."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        above = "> 0" if low == TINY else f">= {low:g}"
        span = above if high == 1e300 else f"{above} and <= {high:g}"
        raise BadInput(f"{what}: expected a finite number {span}, got {value!r}; {fix}")


def check_one_of(what: str, value: object, known: Iterable[str]) -> None:
    """Raise BadInput unless value is one of the known names."""
    known = list(known)
    if value not in known:
        raise BadInput(f"{what}: expected one of {', '.join(known)}, got {value!r}; choose one")
