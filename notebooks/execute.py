"""Run notebooks from top to bottom and write them back with what they print and draw.

    python notebooks/execute.py                             all of them: that is `make notebooks`
    python notebooks/execute.py notebooks/02_noise.ipynb    this one

The tests run them too, in the short form that MINILLADA_SHORT asks for.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent
METADATA = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
METADATA |= {"language_info": {"name": "python"}}


def execute(path: Path, seconds: float, **environment: str) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel, and nothing that depends on the day or the machine's Python.

    Raises nbclient's errors: CellExecutionError, or CellTimeoutError for the cell at which the time is over.
    """
    book = nbformat.read(path, as_version=4)
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


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """What was printed in one go as one output: where a kernel cuts it depends on the machine's haste."""
    whole: list[nbformat.NotebookNode] = []
    for output in outputs:
        if whole and output.output_type == whole[-1].output_type == "stream" and output.name == whole[-1].name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def main() -> None:
    for path in map(Path, sys.argv[1:] or sorted(NOTEBOOKS.glob("*.ipynb"))):
        start = time.monotonic()
        nbformat.write(execute(path.resolve(), seconds=3600), path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
