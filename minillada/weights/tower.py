"""Compute what is in the tiles of a picture: SigLIP's tower (arXiv:2303.15343), as LLaDA-V has it, of any size.

Its shape stands in vision_config.json beside config.json; the published tower's, which has no such file, in TOWERS.

Shapes: N tiles, S pixels of a tile's side, G = S // patch size, D width.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TINY, BadInput, check_number, check_whole
from ..files import CONFIG_CAP, confined, expect, listed, read_json
from .pictures import aspect_of
from .schemes import COMMON, LLADA_V

TOWER = "vision_config.json"  # beside config.json: the shape of a tower that is not one of TOWERS
TOWERS = {1152: dict(width=1152, d_ff=4304, n_layer=26, n_head=16, image_size=384, patch_size=14)}  # by mm_hidden_size
KEYS = {"width": "hidden_size", "d_ff": "intermediate_size", "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads", "image_size": "image_size", "patch_size": "patch_size",
        "norm_eps": "layer_norm_eps"}  # fmt: skip
FIXED = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "model_type": "siglip_vision_model"}


@dataclass(frozen=True)
class Vision:
    """Hold the shape of a tower, and how pictures are cut into tiles."""

    width: int  # D
    d_ff: int
    n_layer: int  # those that are computed: one fewer than SigLIP has
    n_head: int
    image_size: int  # S
    patch_size: int
    norm_eps: float = 1e-6
    aspect: str = "pad"  # or anyres, or anyres_max_N: see `pictures.tile`
    grids: tuple[tuple[int, int], ...] = tuple((i, j) for i in range(1, 7) for j in range(1, 7))  # columns, rows

    def __post_init__(self) -> None:
        for name, most in {"width": 2**14, "d_ff": 2**17, "n_layer": 256, "image_size": 2**12}.items():
            check_whole(f"vision {name}", getattr(self, name), 1, most)
        check_whole("vision patch_size", self.patch_size, 1, self.image_size)
        check_whole("vision n_head", self.n_head, 1, self.width)
        check_number("vision norm_eps", self.norm_eps, TINY)
        if self.width % self.n_head:
            what = f"vision n_head: expected a divisor of the width {self.width}, got {self.n_head}"
            raise BadInput(f"{what}; change one of the two")
        aspect_of(self.aspect)

    @property
    def side(self) -> int:
        return self.image_size // self.patch_size  # G


class TowerLayer(nn.Module):
    """Let every patch of a tile look at every other one, then compute a feed-forward of each alone."""

    def __init__(self, v: Vision) -> None:
        super().__init__()
        self.n_head = v.n_head
        self.norm1, self.norm2 = nn.LayerNorm(v.width, v.norm_eps), nn.LayerNorm(v.width, v.norm_eps)
        self.q, self.k, self.v, self.o = (nn.Linear(v.width, v.width) for _ in range(4))
        self.up, self.down = nn.Linear(v.width, v.d_ff), nn.Linear(v.d_ff, v.width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Tower(nn.Module):
    """Turn tiles (N,3,S,S) with values from -1 to 1 into features (N,G*G,D): SigLIP."""

    def __init__(self, v: Vision) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, v.width, v.patch_size, stride=v.patch_size)
        self.positions = nn.Embedding(v.side**2, v.width)
        self.layers = nn.ModuleList(TowerLayer(v) for _ in range(v.n_layer))
        self.post_norm = nn.LayerNorm(v.width, v.norm_eps).requires_grad_(False)  # in the files, and not computed

    def forward(self, tiles: Tensor) -> Tensor:
        x = self.patch(tiles).flatten(2).transpose(1, 2) + self.positions.weight  # (N,G*G,D)
        for layer in self.layers:
            x = layer(x)
        return x


def read_vision(directory: Path) -> Vision:
    """Return what config.json says about pictures, and the tower's shape: that of vision_config.json, or of TOWERS.
    Raises BadInput."""
    raw, fix = read_json(confined(directory, "config.json"), CONFIG_CAP), "change that value in config.json"
    width, aspect, grids = (raw.get(key) for key in LLADA_V.seen)
    if os.path.lexists(directory / TOWER):
        tower = read_json(confined(directory, TOWER), CONFIG_CAP)
        for key, wanted in FIXED.items():
            got = tower.get(key, wanted)
            expect(got == wanted, f"{key} in {TOWER}", f"{wanted!r}, all that is implemented", got, "use another tower")
        if unknown := sorted(tower.keys() - {*KEYS.values(), *FIXED, *COMMON, "attention_dropout"}):
            raise BadInput(f"{TOWER}: expected only keys that are implemented here, got {listed(unknown)}; remove them")
        if absent := [key for key in KEYS.values() if key not in tower]:
            raise BadInput(f"{TOWER}: expected the tower's shape, got no {listed(absent)}; add them there")
        shape = {name: tower[key] for name, key in KEYS.items()}
        check_whole(f"num_hidden_layers in {TOWER}", shape["n_layer"], 2)
        shape["n_layer"] -= 1  # LLaDA-V cuts the last one off
    else:
        known = type(width) is int and width in TOWERS
        expect(known, "mm_hidden_size", f"{listed(list(TOWERS))}, or a {TOWER}", width, f"add {TOWER}")
        shape = TOWERS[width]
    expect(width == shape["width"], "mm_hidden_size", f"the tower's width {shape['width']}", width, fix)
    vision = Vision(**shape, aspect=aspect)
    return replace(vision, grids=grids_of(grids, vision.image_size))


def grids_of(found: object, side: int) -> tuple[tuple[int, int], ...]:
    """Return the grids of image_grid_pinpoints: pairs of pixels, or "(1x1),...,(6x6)". Raises BadInput."""
    if found is None:
        return Vision.grids
    if isinstance(found, str) and (ends := re.findall(r"\((\d{1,2})x(\d{1,2})\)", found)):
        (a, b), (c, d) = (map(int, end) for end in (ends[0], ends[-1]))
        found = [[i * side, j * side] for i in range(a, c + 1) for j in range(b, d + 1)]
    holds = isinstance(found, list) and 0 < len(found) <= 400
    holds = holds and all(isinstance(pair, list) and len(pair) == 2 for pair in found)
    holds = holds and all(type(n) is int and 0 < n <= 20 * side and n % side == 0 for pair in found for n in pair)
    expect(holds, "image_grid_pinpoints", f"pairs of multiples of {side}", found, "change that value in config.json")
    return tuple((wide // side, high // side) for wide, high in found)


def write_vision(v: Vision) -> tuple[dict, dict]:
    """Return the keys of config.json about pictures, and vision_config.json, {} for a tower of TOWERS."""
    pixels = [[v.image_size * n for n in grid] for grid in v.grids]
    keys = dict(zip(LLADA_V.seen, (v.width, v.aspect, pixels), strict=True))
    if v.width in TOWERS and replace(v, **TOWERS[v.width], norm_eps=Vision.norm_eps) == v:
        return keys, {}
    shape = {key: getattr(v, name) for name, key in KEYS.items()} | FIXED
    return keys, shape | {"num_hidden_layers": v.n_layer + 1, "architectures": ["SiglipVisionModel"]}
