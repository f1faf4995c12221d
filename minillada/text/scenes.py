"""Draw pictures of a few coloured things, with questions whose answers are known: what a tiny model learns to see from.

A picture has 3 x 3 cells of 16 x 16 pixels, one to three of them with a thing in it. No two things of a picture have
the same colour or the same form. Some pairs of a colour and a form are never drawn for training (`UNSEEN`). `forms` can
be anything with masks, handwritten digits for instance.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import BadLuck
from ..files import write_file

CELL, SIDE = 16, 3  # pixels of a cell's side, cells of a picture's side
COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 80, 200), "yellow": (240, 205, 20),
           "purple": (148, 60, 190), "black": (20, 20, 20)}  # fmt: skip
PLACES = ["top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right"]
WORDS = {1: "one", 2: "two", 3: "three"}
Forms = Mapping[str, Sequence[np.ndarray]]  # name -> masks (CELL,CELL) from 0 to 1, of which one is drawn at random


def shapes() -> dict[str, list[np.ndarray]]:
    """Return circles, squares, triangles and crosses, each in several sizes and places within a cell."""
    y, x = np.mgrid[:CELL, :CELL].astype(float)
    found: dict[str, list[np.ndarray]] = {"circle": [], "square": [], "triangle": [], "cross": []}
    for r in (5.0, 5.7, 6.4):
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                u, v = x - 7.5 - dx, y - 7.5 - dy
                inside = (abs(u) <= r) & (abs(v) <= r)
                found["circle"].append(u**2 + v**2 <= r**2)
                found["square"].append((abs(u) <= 0.9 * r) & (abs(v) <= 0.9 * r))
                found["triangle"].append(inside & (2 * abs(u) <= v + r))
                found["cross"].append(inside & (np.minimum(abs(u), abs(v)) <= 0.3 * r))
    return {name: [mask.astype(float) for mask in masks] for name, masks in found.items()}


class Thing(NamedTuple):
    cell: int  # 0 to 8, row by row
    colour: str
    form: str

    def __str__(self) -> str:
        return f"{self.colour} {self.form}"


class Asked(NamedTuple):
    """A question about a picture; kinds have accuracies of their own."""

    kind: str
    prompt: str
    answer: str


def unseen(forms: Iterable[str]) -> set[tuple[str, str]]:
    """Return pairs of colour and form that training never shows: one for each form, of another colour each."""
    return set(zip(COLOURS, forms))  # noqa: B905 (there may be more of either)


def scene(rng: random.Random, forms: Sequence[str], n: int, of: str = "seen") -> list[Thing]:
    """Place n things in cells, from the top left to the bottom right. of: "seen", pairs that training shows; "unseen",
    among them one that it never shows."""
    never = unseen(forms)
    while True:
        colours, names = rng.sample(list(COLOURS), n), rng.sample(list(forms), n)
        strange = sum(pair in never for pair in zip(colours, names, strict=True))
        if strange == (of == "unseen"):
            cells = sorted(rng.sample(range(SIDE * SIDE), n))
            return [Thing(*thing) for thing in zip(cells, colours, names, strict=True)]


def draw(things: Iterable[Thing], forms: Forms, rng: random.Random) -> np.ndarray:
    """Return the pixels (48,48,3) uint8 of a scene, on a light ground, a little uneven."""
    noise = np.random.default_rng(rng.getrandbits(32))
    pixels = np.full((SIDE * CELL, SIDE * CELL, 3), rng.uniform(225, 250))
    for cell, colour, form in things:
        y, x = CELL * (cell // SIDE), CELL * (cell % SIDE)
        mask = rng.choice(forms[form])[..., None]
        part = pixels[y : y + CELL, x : x + CELL]
        part += mask * (np.array(COLOURS[colour]) - part)
    return (pixels + noise.normal(0, 5, pixels.shape)).clip(0, 255).astype(np.uint8)


def relation(a: Thing, b: Thing) -> str:
    """Return how a lies to b: left of it, right of it or, in the same column, above or below it."""
    if a.cell % SIDE != b.cell % SIDE:
        return "left of" if a.cell % SIDE < b.cell % SIDE else "right of"
    return "above" if a.cell < b.cell else "below"


def caption(things: Sequence[Thing]) -> str:
    """Describe a scene of one or two things, the left or upper one first: `a red circle left of a blue square`."""
    first, *rest = sorted(things, key=lambda thing: (thing.cell % SIDE, thing.cell))
    return f"a {first}" + "".join(f" {relation(first, other)} a {other}" for other in rest)


def questions(things: Sequence[Thing], rng: random.Random) -> list[Asked]:
    """Return a question of every kind about a scene, and where each thing is, in random order."""
    a = rng.choice(things)
    found = [
        Asked("colour", f"what colour is the {a.form}?", a.colour),
        Asked("shape", f"what is {a.colour}?", f"a {a.form}"),
        Asked("count", "how many things?", WORDS[len(things)]),
        *(Asked("where", f"where is the {thing}?", PLACES[thing.cell]) for thing in things),
        Asked("there", f"what is in the {PLACES[a.cell]}?" if " " in PLACES[a.cell] else f"what is {PLACES[a.cell]}?",
              f"a {a}"),
    ]  # fmt: skip
    if len(things) == 2:
        b = next(thing for thing in things if thing != a)
        right = relation(a, b)
        asked = right if rng.random() < 0.5 else {"left of": "right of", "right of": "left of", "above": "below",
                                                  "below": "above"}[right]  # fmt: skip
        found.append(Asked("yes/no", f"is the {a} {asked} the {b}?", "yes" if asked == right else "no"))
    if len(things) < 3:
        found.append(Asked("caption", "describe:", caption(things)))
    rng.shuffle(found)
    return found


def write_scenes(
    directory: str | Path, forms: Forms, n: Mapping[int, int], seed: int = 0, of: str = "seen", each: int = 3
) -> Path:
    """Write pictures as PNG files, n[k] of them with k things, and scenes.jsonl with `each` questions about each, in
    random order: lines for SFT, {"image": …, "prompt": …, "answer": …, "kind": …}. Return its path. Raises BadLuck."""
    try:
        from PIL import Image
    except ImportError:
        raise BadLuck("scenes: expected Pillow, got none; pip install 'minillada[vision]'") from None
    directory, rng, lines = Path(directory), random.Random(f"scenes {seed} {of}"), []
    (directory / "pictures").mkdir(parents=True, exist_ok=True)
    for number, k in enumerate(count for count in sorted(n) for _ in range(n[count])):
        things = scene(rng, list(forms), k, of)
        name = f"pictures/{number:05d}.png"
        Image.fromarray(draw(things, forms, rng)).save(directory / name)
        lines += [{"image": name, **asked._asdict()} for asked in questions(things, rng)[:each]]
    rng.shuffle(lines)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_file(directory / "scenes.jsonl", [text.encode()])
    return directory / "scenes.jsonl"
