"""A person at a terminal, in front of a script that talks."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
with_terminals = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")


@contextmanager
def chat(*command: object) -> Iterator[Callable[[str], str]]:
    """Start `python COMMAND --chat`; yield say(message) -> all that the terminal shows until the next turn.

    In the end Ctrl-D is typed, after which the script must leave with 0 and without an error.
    """
    import pty

    here, there = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    streams = {"stdin": there, "stdout": there, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, *map(str, command), "--chat"], env=environment, cwd=ROOT, **streams
    ) as child:
        os.close(there)

        def turn(seconds: float = 60) -> str:
            seen, end = "", time.monotonic() + seconds
            while "you> " not in seen:
                assert select.select([here], [], [], end - time.monotonic())[0], f"no next turn in {seen!r}"
                seen += os.read(here, 4096).decode()
            return seen

        def say(message: str) -> str:
            os.write(here, message.encode() + b"\n")
            return turn()

        try:
            turn()
            yield say
        except BaseException:  # else leaving Popen would wait for it for ever
            child.kill()
            raise
        os.write(here, b"\x04")
        assert child.wait(30) == 0
        assert b"error" not in child.stderr.read()
    os.close(here)


def seen_in_terminal(command: list[object], environment: dict[str, str]) -> tuple[str, int]:
    """Run a command in a terminal; return all that it showed there, and its exit code."""
    import pty

    here, there = pty.openpty()
    with subprocess.Popen(list(map(str, command)), env=environment, stdin=there, stdout=there, stderr=there) as child:
        os.close(there)
        seen = b""
        with suppress(OSError):  # Linux reports the end of a terminal in this way
            while piece := os.read(here, 4096):
                seen += piece
    os.close(here)
    return seen.decode(), child.returncode


def last_picture(shown: str) -> str:
    """What stands there after the last time that the picture was drawn anew."""
    return shown.rsplit("\x1b[J", 1)[1]
