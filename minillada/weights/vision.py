"""Let a model see: LLaDA-V (arXiv:2505.16933). A picture becomes patches, which are further rows of the embedding.

    pixels -> tower -> projector -> arrange -> patches (P,C)              ids from V on: V + i is patch i

So a picture in a prompt is a list of ids like any text, and the sampler, guidance, caches and the loss need not know of
it. `see` adds a picture to a model.

Shapes: B batch, T sequence, V rows of the embedding, C model width, N tiles, G patches of a tile's side, P patches of a
picture.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..errors import BadInput
from ..model import LLaDA, ModelConfig
from .pictures import Tiles, field, n_patches, open_picture, tile
from .tower import Tower, Vision

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class SeeingConfig(ModelConfig):
    """Hold what a model is, and how many patches of pictures it has been shown."""

    n_patch: int = 0  # the ids from embedding_size on are theirs


class SeeingEmbedding(nn.Embedding):
    """Look up words in a table of V rows, and from id V on patches of pictures.

    The patches come from `see`, which computes them once; or from `album`, pictures that are looked at anew whenever
    their ids occur, so that the tower can learn.
    """

    def __init__(self, words: nn.Embedding, vision: Vision) -> None:
        super().__init__(*words.weight.shape, device="meta")
        self.weight, self.vision = words.weight, vision
        self.tower, width = Tower(vision), words.embedding_dim
        self.projector = nn.Sequential(nn.Linear(vision.width, width), nn.GELU(), nn.Linear(width, width))
        self.newline = nn.Parameter(torch.zeros(width))  # behind each row of patches
        self.patches, self.album = torch.empty(0, width, device="cpu"), []

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings of ids (B,T): (B,T,C)."""
        words = super().forward(ids.clamp(max=self.num_embeddings - 1))
        if not len(self.patches) and not self.album:
            return words
        at = ids - self.num_embeddings  # below 0: a word
        patches, at = self.looked_up(at) if self.album else (self.patches, at)
        return torch.where(at[..., None] >= 0, patches.to(words)[at.clamp(min=0)], words)

    def looked_up(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Look at those pictures of the album whose patches are among `at` (B,T); return these patches in order, and
        where each of `at` lies among them."""
        ends = torch.tensor([n_patches(tiles, self.vision.side) for tiles in self.album], device=at.device).cumsum(0)
        of = torch.bucketize(at.clamp(min=0), ends, right=True)  # (B,T) the picture that a patch belongs to
        which, of = of.unique(return_inverse=True)
        patches = self.look([self.album[i] for i in which.tolist()])
        starts = torch.tensor([0, *map(len, patches[:-1])], device=at.device).cumsum(0)
        before = F.pad(ends, (1, 0))[which]  # the first of a picture's patches in the whole album
        return torch.cat(patches), torch.where(at < 0, at, at - before[of] + starts[of])

    def look(self, pictures: Sequence[Tiles]) -> list[Tensor]:
        """Return the patches (P,C) of each picture."""
        weight = self.newline
        pixels = torch.cat([tiles.pixels for tiles in pictures]).to(weight.device)
        values = (pixels.double() * (1 / 255)).float() if pixels.device.type != "mps" else pixels.float() / 255
        patches = self.projector(self.tower(((values - 0.5) / 0.5).to(weight.dtype)))  # (N,G*G,C)
        parts = patches.split([len(tiles.pixels) for tiles in pictures])
        return [self.arrange(part, tiles) for part, tiles in zip(parts, pictures, strict=True)]

    def arrange(self, patches: Tensor, tiles: Tiles) -> Tensor:
        """Put the patches (N,G*G,C) of a picture in the order in which it is read: the whole picture, then the grid
        row by row, as far as it shows the picture, with a newline behind each row."""
        if tiles.grid == (0, 0):
            return torch.cat([patches[0], self.newline[None]])
        side, (columns, rows) = self.vision.side, tiles.grid
        grid = patches[1:].unflatten(0, (rows, columns)).unflatten(2, (side, side))  # (rows,columns,G,G,C)
        grid = grid.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)  # (C,rows*G,columns*G)
        high, wide, *size = field(tiles, side)
        grid = grid[:, high, wide]
        if list(grid.shape[1:]) != size:
            grid = F.interpolate(grid[None], size, mode="bilinear")[0]
        ends = self.newline[:, None, None].expand(-1, grid.shape[1], 1)
        return torch.cat([patches[0], torch.cat([grid, ends], 2).flatten(1).T])


def with_vision(model: LLaDA, vision: Vision, rng: Generator | None = None) -> LLaDA:
    """Give a model, in place, a tower and a projector with random weights; return it."""
    embed = SeeingEmbedding(model.embed, vision)
    with torch.no_grad():
        for name, p in embed.named_parameters():
            if name == "newline" or name.endswith("positions.weight"):  # as large as words are
                nn.init.normal_(p, generator=rng)
            elif p.dim() > 1 and name != "weight":
                nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=rng)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
    model.embed = embed
    return model


def sees(model: nn.Module) -> bool:
    return isinstance(getattr(model, "embed", None), SeeingEmbedding)


def see(model: LLaDA, image: "str | Path | Image", aspect: str | None = None) -> tuple[LLaDA, list[int]]:
    """Show a picture to a model; return the same weights with the picture's patches, and the ids of these patches, to
    put into a prompt. A model that sees pictures already sees this one too, and their ids stay as they are.

    image: a path or a PIL image. aspect: "pad", "anyres" or "anyres_max_N"; None: the model's own. Raises BadInput for
    a model without a tower or a picture that cannot be used, BadLuck without Pillow or such a file.
    """
    if not sees(model):
        raise BadInput("see: expected a model with a vision tower, got one that only reads; load a LLaDA-V")
    v = model.embed.vision
    tiles = tile(open_picture(image), v.image_size, v.aspect if aspect is None else aspect, v.grids)
    with torch.no_grad():
        new = model.embed.look([tiles])[0]
    embed, seeing = copy(model.embed), copy(model)
    embed.patches, embed.album = torch.cat([model.embed.patches.to(new), new]), []
    seeing._modules = model._modules | {"embed": embed}  # the rest is shared
    seeing.config = showing(model.config, len(embed.patches))
    first = model.config.embedding_size + len(model.embed.patches)
    return seeing, list(range(first, first + len(new)))


def with_album(model: LLaDA, album: Sequence[Tiles]) -> LLaDA:
    """Let a model, in place, look at the pictures of an album whenever their ids, from V on, occur; return it."""
    if album:
        model.embed.album = album
        model.config = showing(model.config, sum(n_patches(tiles, model.embed.vision.side) for tiles in album))
    return model


def showing(c: ModelConfig, n_patch: int) -> SeeingConfig:
    """Return the config of a model that has been shown pictures of so many patches."""
    return SeeingConfig(**{f.name: getattr(c, f.name) for f in fields(ModelConfig)}, n_patch=n_patch)
