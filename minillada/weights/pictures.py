"""Open a picture that may be anything, and cut it into tiles as LLaDA-V does. Needs the extra `vision`: Pillow.

Nothing is decoded before the format and the number of pixels are known to be all right. What cannot be shown rightly is
refused in one line. Shapes: N tiles, S pixels of a tile's side.
"""

import base64
import io
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput, BadLuck
from ..files import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
LARGEST = 1 << 26  # pixels; decoded they take three to four bytes each
GREY = (127, 127, 127)  # the border of "pad"


def pillow() -> ModuleType:
    """Return Pillow's module Image. Raises BadLuck if it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise BadLuck("picture: expected Pillow, got none; pip install 'minillada[vision]'") from None
    return Image


def open_picture(image: "str | Path | Image") -> "Image":
    """Return a picture, or the first frame of the one in a file, as it is meant to be seen: in RGB, upright, in front
    of white where it is transparent. Raises BadInput, BadLuck."""
    library = pillow()
    if isinstance(image, library.Image):
        return checked(image, "picture")
    if not isinstance(image, (str, Path)):
        raise BadInput(f"picture: expected a path or a PIL image, got {type(image).__name__}; give one of these")
    with one_line(f"{image}: expected a picture that can be read", "check its name and permissions"):
        if not Path(image).is_file():  # a FIFO would block
            raise BadLuck(f"{image}: expected a picture, got no such file; check the name")
        with open(image, "rb") as file:
            return checked(file, str(image))


def checked(source: "BinaryIO | Image", name: str) -> "Image":
    """Decode a picture if its format and size are all right. Raises BadInput, with the name, for any fault."""
    library = pillow()
    fault, fix = f"{name}: expected a whole picture ({', '.join(FORMATS)})", "save it anew"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, which are counted here, and of odd notes in a file
            picture = source if isinstance(source, library.Image) else library.open(source, formats=FORMATS)
            if picture.width * picture.height > LARGEST:
                got = f"{picture.width} x {picture.height}"
                raise BadInput(f"{name}: expected at most {LARGEST:,} pixels, got {got}; make it smaller")
            return seen(picture)
    except (BadInput, MemoryError):
        raise
    except library.UnidentifiedImageError:
        raise BadInput(f"{fault}, got something else; {fix}") from None
    except Exception as error:  # decoders raise whatever they stumble over
        raise BadInput(f"{fault}, got {' '.join(str(error).split())[:200]!r}; {fix}") from error


def seen(picture: "Image") -> "Image":
    """Return what a person sees of a picture, in RGB."""
    from PIL import Image, ImageOps

    picture.load()
    picture = ImageOps.exif_transpose(picture)  # a camera may note how it was held
    if picture.mode.startswith("I"):  # 16 bits of grey: what Pillow does is to cut off all above 255
        bits = np.asarray(picture).astype(np.int64)
        if bits.min() < 0 or bits.max() > 65535:
            raise BadInput("picture: expected at most 16 bits of grey, got more; save it with 8")
        picture = Image.fromarray(((bits + 128) // 257).astype(np.uint8))
    if picture.mode == "F":
        raise BadInput("picture: expected whole numbers as pixels, got floating ones; save it with 8 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def data_url(picture: "Image", most: int = 640) -> str:
    """Return a picture as a `data:` URL that a page can hold, made smaller if it has more than `most` pixels a side."""
    picture, buffer = picture.copy(), io.BytesIO()
    picture.thumbnail((most, most))
    picture.save(buffer, "PNG" if max(picture.size) <= 128 else "JPEG")
    kind = "png" if buffer.getvalue().startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- Tiles -----------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Hold a picture as the tower gets it: the whole of it and, with "anyres", the tiles of a grid row by row."""

    pixels: Tensor  # (N,3,S,S) uint8
    grid: tuple[int, int]  # columns and rows of the grid; (0, 0): no grid
    size: tuple[int, int]  # width and height of the picture
    most: float  # the grid's patches are shrunk to about so many tiles' worth


def aspect_of(aspect: str) -> float | None:
    """Return how many tiles' worth of patches a way of tiling allows; None for "pad". Raises BadInput."""
    found = re.fullmatch(r"pad|anyres(?:_max_([1-9]\d{0,3}))?", aspect) if isinstance(aspect, str) else None
    if not found:
        raise BadInput(f"aspect: expected pad, anyres or anyres_max_N, got {aspect!r:.60}; choose one of these")
    return None if aspect == "pad" else float(found[1] or math.inf)


def tile(picture: "Image", side: int, aspect: str, grids: Iterable[tuple[int, int]]) -> Tiles:
    """Cut an RGB picture into tiles of side x side pixels. "pad": one, of the picture in a grey square. "anyres": the
    whole picture squashed to one tile, then those of the best of the grids (columns, rows). Raises BadInput."""
    most = aspect_of(aspect)
    if most is None:
        square = pillow().new("RGB", (max(picture.size),) * 2, GREY)
        square.paste(picture, tuple((max(picture.size) - edge) // 2 for edge in picture.size))
        return Tiles(pixels_of([square.resize((side, side))]), (0, 0), picture.size, math.inf)
    columns, rows = best_grid(picture.size, side, grids)
    canvas = fitted(picture, columns * side, rows * side)
    corners = [(side * i, side * j) for j in range(rows) for i in range(columns)]
    parts = [canvas.crop((x, y, x + side, y + side)) for x, y in corners]
    return Tiles(pixels_of([picture.resize((side, side)), *parts]), (columns, rows), picture.size, most)


def best_grid(size: tuple[int, int], side: int, grids: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the grid that keeps the most of a picture's pixels and, among equals, wastes the fewest of its own."""
    width, height = size

    def worth(grid: tuple[int, int]) -> tuple[int, int]:
        wide, high = (side * n for n in grid)
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - wide * high

    return max(grids, key=worth)


def fitted(picture: "Image", wide: int, high: int) -> "Image":
    """Return the picture as large as it fits into wide x high pixels, in the middle of black."""
    width, height = picture.size
    if wide / width < high / height:
        size = wide, min(math.ceil(height * (wide / width)), high)
    else:
        size = min(math.ceil(width * (high / height)), wide), high
    canvas = pillow().new("RGB", (wide, high))
    canvas.paste(picture.resize(size), ((wide - size[0]) // 2, (high - size[1]) // 2))
    return canvas


def pixels_of(pictures: "list[Image]") -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


def field(tiles: Tiles, unit: int) -> tuple[slice, slice, int, int]:
    """Return which rows and columns of the grid's patches, unit x unit a tile, show the picture and not its border, and
    the height and width to shrink them to. A picture of 20 x 10 on one tile of 4 x 4 -> rows 1:3, columns 0:4, 2, 4."""
    (width, height), (columns, rows) = tiles.size, (unit * n for n in tiles.grid)
    above, left = 0, 0
    if width / height > columns / rows:
        above = (rows - int(height * (columns / width))) // 2
    else:
        left = (columns - int(width * (rows / height))) // 2
    high, wide = rows - 2 * above, columns - 2 * left
    times = math.sqrt(high * wide / (tiles.most * unit**2))
    shrunk = (int(high // times), int(wide // times)) if times > 1.1 else (high, wide)
    return slice(above, rows - above), slice(left, columns - left), *shrunk


def n_patches(tiles: Tiles, unit: int) -> int:
    """Return how many patches a picture makes, each row of its grid with a newline behind it; unit: a tile's side."""
    if tiles.grid == (0, 0):
        return unit * unit + 1
    _, _, high, wide = field(tiles, unit)
    return unit * unit + high * (wide + 1)
