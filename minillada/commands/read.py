"""Make the annotated course, one page with prose beside the code, and open it in the browser."""

import argparse
import tempfile
import webbrowser
from pathlib import Path

from ..files import write_file
from ..show.literate import MARK, page
from ..show.page import check_file
from .cli import Parser, say

EXAMPLES = """examples:
  python -m minillada read                          opens the page, which lies in a new temporary directory
  python -m minillada read --out course.html        writes it and opens nothing
"""


def main() -> None:
    """Read the options, write the page, print where it is, and open it."""
    p = Parser(__doc__, EXAMPLES)
    p.add_argument("--out", type=Path, metavar="FILE", help="write it here: a new file, or an older page of this kind")
    action = argparse.BooleanOptionalAction
    p.add_argument("--open", action=action, help="open it in the browser (default: unless --out is given)")
    args = p.parse_args()
    path = args.out or Path(tempfile.mkdtemp(prefix="minillada-")) / "read.html"
    if not written_before(path):
        check_file("out", path)
    write_file(path, [page().encode()])
    say(str(path))
    if args.open or (args.open is None and args.out is None):
        webbrowser.open(path.absolute().as_uri())


def written_before(path: Path) -> bool:
    """Return whether the file is there and is a page of this kind, which may be replaced."""
    if not path.is_file() or path.is_symlink():
        return False
    with open(path, "rb") as file:
        return MARK.encode() in file.read(300)
