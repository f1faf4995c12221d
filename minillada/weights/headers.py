"""Read and check the headers of safetensors files, before a weight is read or memory is taken for one.

A header is JSON that says for each tensor its dtype, its shape and its bytes. It comes from a stranger, so everything
that it claims is compared with the size of the file. Whatever does not fit raises BadInput in one line.
"""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import files
from ..errors import BadInput
from ..files import confined, expect, listed

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Entry(NamedTuple):
    """Where a tensor lies: in which file, and from which byte on."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def kind(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def read_headers(directory: Path) -> dict[str, Entry]:
    """Return every tensor of a checkpoint by name; of several files, the index must agree with their headers."""
    if not os.path.lexists(directory / INDEX):
        if not os.path.lexists(directory / SINGLE):
            pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            got = f"{listed(pickles)}: pickle is not supported" if pickles else "none"
            raise BadInput(f"weights: expected {SINGLE} or {INDEX}, got {got}; convert or download them")
        return read_header(directory, SINGLE)
    where = files.read_json(confined(directory, INDEX), files.INDEX_CAP).get("weight_map")
    check = partial(expect, what=f"weight_map in {INDEX}", fix="download it again")
    check(isinstance(where, dict) and len(where) > 0, expected="an object", got=where)
    for file in where.values():
        holds = isinstance(file, str) and file.endswith(".safetensors")
        check(holds, expected="names that end in .safetensors", got=file)
    entries: dict[str, Entry] = {}
    for file in dict.fromkeys(where.values()):
        for name, entry in read_header(directory, file).items():
            if name in entries:
                raise BadInput(f"{name!r}: expected in one file, got {entries[name].file} and {file}; delete one")
            entries[name] = entry
    there = {name: entry.file for name, entry in entries.items()}
    if odd := sorted({repr(name) for name, _ in where.items() ^ there.items()}):
        raise BadInput(f"{INDEX}: expected what the files hold, got another place for {listed(odd)}; download it again")
    return entries


def read_header(directory: Path, file: str) -> dict[str, Entry]:
    """Return the tensors of one file by name; their bytes must fill it without a gap, an overlap or a rest."""
    path, check = confined(directory, file), partial(expect, fix="download the file again")
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        cap = min(files.HEADER_CAP, size - 8)
        check(0 < length <= cap, file, f"a header of 1 to {cap:,} bytes", length)
        header = files.parse_json(f.read(length), f"header of {file}")
    metadata = header.pop("__metadata__", {})
    check(isinstance(metadata, dict), file, "an object as __metadata__", metadata)
    check(len(header) > 0, file, "at least one tensor", "none")
    end, entries = 8 + length, {}
    for name, value in header.items():
        what = f"{name!r:.200} in {file}"
        holds = isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}
        check(holds, what, "dtype, shape and data_offsets", value)
        code, shape, span = value["dtype"], value["shape"], value["data_offsets"]
        check(isinstance(code, str) and code in DTYPES, what, f"a dtype of {', '.join(DTYPES)}", code)
        check(whole(shape, 1, 8), what, "a shape of 1 to 8 whole numbers", shape)
        check(whole(span, 2, 2), what, "two offsets", span)
        entry = entries[name] = Entry(file, DTYPES[code], tuple(shape), end + span[0])
        check(span[1] - span[0] == entry.nbytes, what, f"{entry.nbytes} bytes", span)
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        check(entry.offset == end, f"{name!r:.200} in {file}", f"to start at byte {end}", entry.offset)
        end += entry.nbytes
    check(end == size, file, f"{end} bytes", size)
    return entries


def whole(values: Any, least: int, most: int) -> bool:
    """Tell whether this is a list of least to most whole numbers, none larger than any disk."""
    counted = isinstance(values, list) and least <= len(values) <= most
    return counted and all(type(value) is int and 0 <= value < 2**48 for value in values)
