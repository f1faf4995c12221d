"""Read and write GGUF, the file format of llama.cpp: keys with values, and tensors, some of them in few bits.

A file is "GGUF", its version, the number of tensors and of keys; then each key with its type and value; then of each
tensor the name, the sizes (innermost first), the kind and the place; then the tensors. All is little-endian, a text has
its length in front, and a tensor starts at a multiple of the alignment. The header may come from a stranger, so all
that it claims is compared with the size of the file. NumPy is all that is needed.
"""

import math
import struct
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .. import files
from ..errors import BadInput
from ..files import confined, expect, one_line

HEADER_CAP, MOST = 128 << 20, 1 << 21  # bytes of a header; elements of all its lists together
ALIGNMENT = 32  # of what is written here
NUMBERS = dict(enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"])) | {10: "<u8", 11: "<i8", 12: "<f8"}
U32, I32, F32, BOOL, TEXT, LIST = 4, 5, 6, 7, 8, 9


class Kind(NamedTuple):
    """How the numbers of a tensor are stored: so many together, in so many bytes."""

    code: int
    block: int
    nbytes: int


KINDS = {"f32": Kind(0, 1, 4), "f16": Kind(1, 1, 2), "bf16": Kind(30, 1, 2), "q8_0": Kind(8, 32, 34),
         "q4_0": Kind(2, 32, 18)}  # fmt: skip
OTHERS = {  # what llama.cpp computes with, but is not unpacked here
    "q4_1": Kind(3, 32, 20), "q5_0": Kind(6, 32, 22), "q5_1": Kind(7, 32, 24), "q2_k": Kind(10, 256, 84),
    "q3_k": Kind(11, 256, 110), "q4_k": Kind(12, 256, 144), "q5_k": Kind(13, 256, 176), "q6_k": Kind(14, 256, 210),
    "iq4_nl": Kind(20, 32, 18), "iq4_xs": Kind(23, 256, 136),
}  # fmt: skip


class Stored(NamedTuple):
    """Where a tensor lies, and how."""

    file: str
    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return size_of(self.kind, self.shape)


def size_of(kind: str, shape: tuple[int, ...]) -> int:
    _, block, nbytes = (KINDS | OTHERS)[kind]
    return math.prod(shape) // block * nbytes


# ---- Numbers (rows, n) <-> bytes (rows, m) ---------------------------------------------------------------------------


def pack(kind: str, x: np.ndarray) -> np.ndarray:
    """Store x (rows, n) float32 as bytes (rows, m), as llama.cpp does. For q8_0 and q4_0, n is a multiple of 32.

    q8_0: x = d q, q from -127 to 127; d, in float16, is the largest |x| of 32 over 127. q4_0: x = d (q - 8), q from 0
    to 15; d is the number of largest |x| over -8, and a byte has q of number i and, above it, of number i + 16.
    """
    if kind == "f32":
        return x.view(np.uint8)
    if kind == "f16":
        return x.astype(np.float16).view(np.uint8)
    if kind == "bf16":  # the upper half of a float32, rounded to even
        bits = x.view(np.uint32)
        return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16).view(np.uint8)
    blocks = x.reshape(-1, 32)
    if kind == "q8_0":
        d = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
        scaled = blocks * inverse(d)
        q = np.trunc(scaled)
        q = (q + np.trunc(2 * (scaled - q))).astype(np.int8).view(np.uint8)  # halves away from zero
    else:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
        d = largest / np.float32(-8)
        q = np.minimum(blocks * inverse(d) + np.float32(8.5), 15).astype(np.uint8)
        q = q[:, :16] | q[:, 16:] << 4
    return np.concatenate([d.astype(np.float16).view(np.uint8), q], axis=1).reshape(len(x), -1)


def inverse(d: np.ndarray) -> np.ndarray:
    """Return 1 / d, and 0 for 0."""
    return np.divide(1, d, out=np.zeros_like(d), where=d != 0)


def unpack(kind: str, data: np.ndarray, n: int) -> np.ndarray:
    """Return the numbers (rows, n) float32 that bytes (rows, m) stand for."""
    if kind == "f32":
        return data.view("<f4")
    if kind == "f16":
        return data.view("<f2").astype(np.float32)
    if kind == "bf16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = data.reshape(-1, KINDS[kind].nbytes)
    d, q = blocks[:, :2].copy().view("<f2").astype(np.float32), blocks[:, 2:]
    if kind == "q4_0":
        q = np.concatenate([q & 15, q >> 4], axis=1).view(np.int8) - np.int8(8)
    return (d * q.view(np.int8)).reshape(-1, n)


# ---- Reading ---------------------------------------------------------------------------------------------------------


class Header(NamedTuple):
    """What a file says before its tensors."""

    keys: dict[str, Any]
    tensors: dict[str, Stored]


def read_header(path: Path) -> Header:
    """Return the keys and the tensors, which must fill the file without a gap. Raises BadInput, BadLuck."""
    real = confined(path.parent, path.name)
    with one_line(f"{path.name}: expected to read it", "check the disk"), open(real, "rb") as f:
        return Reader(f, path.name, real.stat().st_size).header()


class Reader:
    """Read a header piece by piece, never past its cap or the end of the file."""

    def __init__(self, f: BinaryIO, name: str, size: int) -> None:
        self.f, self.name, self.size = f, name, size
        self.left, self.elements = min(size, HEADER_CAP), MOST
        self.check = partial(expect, fix="download or convert the file again")

    def take(self, n: int) -> bytes:
        self.check(n <= self.left, self.name, f"a header within {min(self.size, HEADER_CAP):,} bytes", f"{n:,} more")
        self.left -= n
        return self.f.read(n)

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        with one_line(f"{self.name}: expected UTF-8 in its header", "download the file again", UnicodeDecodeError):
            return self.take(self.number("Q")).decode()

    def numbers(self, kind: int, n: int) -> np.ndarray:
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self.take(n * dtype.itemsize), "u1" if kind == BOOL else dtype)

    def value(self, key: str) -> Any:
        """Return the value of a key: a bool, an int, a float, a text, a list of texts or an array of numbers."""
        kind, n = self.number("I"), None
        what, known = f"{key!r:.200} in {self.name}", (*NUMBERS, TEXT)
        if kind == LIST:
            kind, n = self.number("I"), self.number("Q")
            self.check(n <= self.elements, what, f"lists of at most {MOST:,} elements together", n)
            self.elements -= n
        self.check(kind in known, what, f"a type of {', '.join(map(str, known))} or a list of it", kind)
        if kind == TEXT:
            return self.text() if n is None else [self.text() for _ in range(n)]
        found = self.numbers(kind, 1 if n is None else n)
        if kind == BOOL:
            self.check((found <= 1).all(), what, "0 or 1 for a bool", found.max(initial=0))
            found = found.astype(bool)
        if n is not None:
            return found
        return float(str(found[0])) if kind == F32 else found[0].item()  # 1e-05, not 9.999999747378752e-06

    def header(self) -> Header:
        self.check(self.take(min(4, self.left)) == b"GGUF", self.name, 'a GGUF file, which begins with "GGUF"', "none")
        version, n_tensors, n_keys = self.number("I"), self.number("Q"), self.number("Q")
        self.check(version in (2, 3), self.name, "version 2 or 3, little-endian", version)
        self.check(0 < n_tensors <= 2**16, self.name, "1 to 65,536 tensors", n_tensors)
        self.check(n_keys <= 2**16, self.name, "at most 65,536 keys", n_keys)
        keys: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.text()
            self.check(key not in keys, self.name, "every key once", key)
            keys[key] = self.value(key)
        align = keys.get("general.alignment", ALIGNMENT)
        holds = type(align) is int and 8 <= align <= 2**16 and align & (align - 1) == 0
        self.check(holds, f"general.alignment in {self.name}", "a power of two from 8 to 65,536", align)
        tensors, end = {}, 0
        for _ in range(n_tensors):
            name = self.text()
            self.check(name not in tensors, self.name, "every tensor once", name)
            tensors[name] = self.tensor(name, end)
            end += tensors[name].nbytes
            end += -end % align
        start = self.f.tell() + -self.f.tell() % align
        tensors = {name: t._replace(offset=start + t.offset) for name, t in tensors.items()}
        last = max(t.offset + t.nbytes for t in tensors.values())
        self.check(
            last <= self.size <= start + end, self.name, f"{last:,} bytes", self.size
        )  # a rest of padding is fine
        return Header(keys, tensors)

    def tensor(self, name: str, end: int) -> Stored:
        """Return what the header says of the tensor that starts where the one before it ends."""
        what, n = f"{name!r:.200} in {self.name}", self.number("I")
        self.check(1 <= n <= 4, what, "1 to 4 sizes", n)
        shape = tuple(self.number("Q") for _ in range(n))[::-1]
        self.check(all(0 < size < 2**40 for size in shape), what, "sizes of 1 to 2^40", shape)
        code, offset = self.number("I"), self.number("Q")
        known = {kind.code: name for name, kind in (KINDS | OTHERS).items()}
        self.check(code in known, what, f"a kind of {', '.join(known.values())}", code)
        block = (KINDS | OTHERS)[known[code]].block
        self.check(shape[-1] % block == 0, what, f"rows of a multiple of {block} numbers for {known[code]}", shape)
        self.check(offset == end, what, f"to start at byte {end:,} of the data", offset)
        return Stored(self.name, known[code], shape, offset)


# ---- Writing ---------------------------------------------------------------------------------------------------------


def write(path: Path, keys: dict, tensors: dict[str, tuple[str, tuple]], pieces: Callable[[str], Iterable]) -> None:
    """Write a file whole or not at all. keys: name -> bool, int, float, text, or list of ints or of texts. tensors:
    name -> (kind, shape). pieces: yields the bytes of a tensor in pieces, so that none is held whole. Raises BadLuck.
    """
    head, end = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))], 0
    head += [encoded(key) + typed(key, value) for key, value in keys.items()]
    for name, (kind, shape) in tensors.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head.append(encoded(name) + sizes + struct.pack("<IQ", KINDS[kind].code, end))
        end += size_of(kind, shape) + -size_of(kind, shape) % ALIGNMENT
    header = b"".join(head)
    files.check_space(path.parent, len(header) + end)
    with files.replacing(path) as f:
        f.write(header + bytes(-len(header) % ALIGNMENT))
        for name in tensors:
            for piece in pieces(name):
                f.write(piece)
            f.write(bytes(-f.tell() % ALIGNMENT))


def encoded(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def typed(key: str, value: Any) -> bytes:
    """Return a value with its type in front. Raises BadInput for one that no type holds."""
    if isinstance(value, list):
        texts = all(isinstance(item, str) for item in value)
        data = b"".join(map(encoded, value)) if texts else np.array(value, "<i4").tobytes()
        return struct.pack("<IIQ", LIST, TEXT if texts else I32, len(value)) + data
    if isinstance(value, str):
        return struct.pack("<I", TEXT) + encoded(value)
    if isinstance(value, int) and not 0 <= value < 2**32:
        raise BadInput(f"{key}: expected a whole number below 2^32, got {value}; GGUF cannot hold this model")
    kind, form = (BOOL, "?") if isinstance(value, bool) else (U32, "I") if isinstance(value, int) else (F32, "f")
    return struct.pack(f"<I{form}", kind, value)
