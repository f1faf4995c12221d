"""Run notebooks from top to bottom and write them back with what they print and draw.

    python notebooks/execute.py                             all of them: that is `make notebooks`
    python notebooks/execute.py notebooks/02_noise.ipynb    this one

The tests run them too, in a short form: a cell's metadata can hold {"short": {"steps=1500": "steps=40"}}, the pieces of
its text that are other ones there. So the cells that a reader sees have the real numbers and claims alone.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from minillada.files import write_file

NOTEBOOKS = Path(__file__).resolve().parent
METADATA = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
METADATA |= {"language_info": {"name": "python"}}


def execute(path: Path, seconds: float, short: bool = False, **environment: str) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of a fresh kernel; nothing depends on the day or the machine's Python.

    Raises nbclient's errors: CellExecutionError, or CellTimeoutError for the cell at which the time is over.
    """
    book = nbformat.read(path, as_version=4)
    if short:
        shorten(book)
    end = time.monotonic() + seconds
    left = lambda cell: max(1.0, end - time.monotonic())
    here = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(book, kernel_name="python3", timeout_func=left, resources=here, record_timing=False)
    client.execute(env=os.environ | environment)
    book.metadata = METADATA
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    return book


def shorten(book: nbformat.NotebookNode) -> None:
    """Put into every cell what its metadata has for the tests. Raises ValueError for a piece that the cell lacks."""
    for cell in book.cells:
        for piece, other in cell.metadata.get("short", {}).items():
            if cell.source.count(piece) != 1:
                raise ValueError(f"cell {cell.id}: expected {piece!r} once, got it {cell.source.count(piece)} times")
            cell.source = cell.source.replace(piece, other)


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Return outputs with what was printed in one go as one: where a kernel cuts it depends on the machine's haste."""
    whole: list[nbformat.NotebookNode] = []
    for output in outputs:
        if whole and output.output_type == whole[-1].output_type == "stream" and output.name == whole[-1].name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def main() -> None:
    """Run the notebooks that are named, or all of them."""
    for path in map(Path, sys.argv[1:] or sorted(NOTEBOOKS.glob("*.ipynb"))):
        start = time.monotonic()
        write_file(path, [f"{nbformat.writes(execute(path.resolve(), seconds=3600))}\n".encode()])
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
