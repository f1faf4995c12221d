"""CUDA graphs: record the kernels of an evaluation once for each shape, and play them again without work for the host.

The 8B starts about a thousand kernels per evaluation, and a host needs longer to start them than an H100 to run them.
Recorded are embedding and layers. Norm and head stay outside, as the number of holes changes from step to step.
"""

from collections.abc import Callable
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from ..errors import check_one_of
from ..model import Around, KVCache, LLaDA, rotary_angles
from ..strategies import Ask, Whole, quick
from ..weights.device import groups_products

KEPT = 8  # recordings; the oldest is dropped
Play = Callable[[], object]
Record = Callable[[Callable[[], Tensor]], tuple[Play, Tensor]]


def recorder() -> Record:
    """Return what records a function on a GPU and returns what plays it again, and the result that this overwrites.
    Recordings share the memory for what lies between, as one plays at a time."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Tensor]) -> tuple[Play, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = run()
        return graph.replay, out

    return record


class Recording(NamedTuple):
    """Hold what an evaluation reads and writes, always at the same addresses, and what does it again."""

    play: Play
    out: Tensor  # (R,T,C), the stream after the last layer
    given: list[Tensor]  # tokens, positions and, if there is one, attn_mask
    held: dict | None  # keys and values


class Graphed(Whole):
    """Answer as `Whole` does. A shape is evaluated as usual the first time, recorded the second, and played from then
    on. It may serve several streams, also in turns: keys and values belong to a cache as long as that lives."""

    def __init__(self, model: LLaDA, record: Record) -> None:
        super().__init__(model)
        self.plain, self.record = quick(Whole)(model), record
        self.seen: dict[tuple, Recording | None] = {}  # shape -> recording, None after the first time; oldest first
        self.lent: list[tuple[ref, dict]] = []  # caches, and the keys and values that each uses

    def __copy__(self) -> "Graphed":
        """Return one that shares no keys and values with this one."""
        return Graphed(self.model, self.record)

    @torch.no_grad()
    def __call__(self, ask: Ask, cache: KVCache | None = None) -> Tensor:
        if ask.positions is not None and type(cache) is not KVCache:  # WINO's shadows: new shapes in every step
            return self.plain(ask, cache)
        held = None if cache is None else cache.layers or self.lend(cache, ask.x)
        positions = torch.arange(ask.x.shape[1], device=ask.x.device) if ask.positions is None else ask.positions
        given = [ask.x, positions, *([] if ask.attn_mask is None else [ask.attn_mask])]
        shape = (id(held), *(x.shape for x in given))
        again, recording = shape in self.seen, self.seen.pop(shape, None)
        if again and recording is None:
            mine = [x.clone() for x in given]
            recording = Recording(*self.record(lambda: self.trunk(cache, *mine)), mine, held)
        self.seen = dict([*self.seen.items(), (shape, recording)][-KEPT:])
        if recording is None:
            return self.plain(ask, cache)
        for inside, outside in zip(recording.given, given, strict=True):
            inside.copy_(outside)
        recording.play()
        return self.model.head(self.model.norm(recording.out[ask.where]))

    def trunk(self, cache: KVCache | None, x: Tensor, positions: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Return the stream (R,T,C) after the last layer."""
        y = self.model.embed(x)
        around = Around(rotary_angles(positions, self.config, y.dtype), positions, attn_mask, cache)
        for layer in self.model.layers:
            y = layer(y, around)
        return y

    def lend(self, cache: KVCache, x: Tensor) -> dict:
        """Give a new cache keys and values whose addresses stay: those of a cache of the same shape that is gone, or
        new ones. What else no cache uses is dropped with its recordings, as a small card has no room for it."""
        c, shape = self.config, (len(x), self.config.n_kv_head, x.shape[1], self.config.d_head)
        free = [held for owner, held in self.lent if owner() is None and held[0][0].shape == shape]
        zeros = self.model.embed.weight.new_zeros
        cache.layers = free[0] if free else {layer: (zeros(shape), zeros(shape)) for layer in range(c.n_layer)}
        self.lent = [pair for pair in self.lent if pair[0]() is not None] + [(ref(cache), cache.layers)]
        alive = {id(None), *(id(held) for _, held in self.lent)}
        self.seen = {shape: recording for shape, recording in self.seen.items() if shape[0] in alive}
        return cache.layers


def graphed(model: LLaDA, graphs: str = "auto") -> LLaDA | Graphed:
    """Return what to sample with: the model, or Graphed where its layers can be recorded, on a GPU. graphs: "auto", or
    "off". Raises BadInput for another word."""
    check_one_of("graphs", graphs, ("auto", "off"))
    if type(model) is not LLaDA:
        return model
    weight, c = model.embed.weight, model.config
    waits = c.n_expert and not groups_products(weight.device, weight.dtype)  # what waits cannot be recorded
    if graphs == "off" or not weight.is_cuda or waits:
        return model
    return Graphed(model, recorder())
