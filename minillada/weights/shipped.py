"""Name the models that come with the package: something to try without training and without a network."""

from pathlib import Path

HOME = Path(__file__).parents[1] / "shipped"

SHIPPED = {  # name -> what it does; docs/shipped.md has the commands that made them
    "tales": "tells little stories",
    "tales-ar": "tells them from left to right: the autoregressive twin of `tales`",
    "sudoku4": "solves 4x4 boards",
    "questions": "answers a question about a story",
}


def shipped(name: str) -> Path | None:
    """Return the directory of the model of that name, None if none comes with the package."""
    return HOME / name if name in SHIPPED and (HOME / name).is_dir() else None
