"""LoRA: train a matrix of low rank beside a frozen one (arXiv:2106.09685).

    y = W x + scale * up(down(x)),    down (r,in) random, up (out,r) zero at first, so nothing has changed yet

The four projections of every attention get such an adapter; everything else stays frozen. W keeps its dtype, which is
what is computed in. Adapters are float32, because many of their steps are too small for bfloat16.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..errors import BadInput, check_whole
from ..model import LLaDA
from ..weights.checkpoint import blank
from ..weights.vision import sees

SCALE = 2.0  # of what the adapters add, whatever their rank: alpha = 2 r


class LoRA(nn.Linear):
    """Compute a frozen linear layer, and add what its adapter says."""

    on = True  # whether the adapter adds anything

    def __init__(self, base: nn.Linear, rank: int, rng: Generator) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        down = torch.randn(rank, base.in_features, generator=rng) * base.in_features**-0.5
        self.down = nn.Parameter(down.to(base.weight.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.on:
            return y
        return y + SCALE * F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def merged(self) -> Tensor:
        """Return the one matrix that does the same, in the dtype of W, rounded once."""
        return (self.weight.float() + SCALE * self.up @ self.down).to(self.weight.dtype)


def adapt(model: LLaDA, rank: int, rng: Generator) -> LLaDA:
    """Freeze a model and add adapters to it, in place. Raises BadInput if it has some, or is quantized."""
    check_whole("lora", rank, 1, model.config.d_model)
    model.requires_grad_(False)
    for layer in model.layers:
        for name in ("q", "k", "v", "o"):
            if type(getattr(layer.attn, name)) is not nn.Linear:  # what PyTorch parametrizes is of a class of its own
                raise BadInput("lora: expected a model as loaded, got an adapted or quantized one; load it anew")
            setattr(layer.attn, name, LoRA(getattr(layer.attn, name), rank, rng))
    return model


def adapters(model: nn.Module) -> nn.ParameterList:
    """Return the parameters that learn in an adapted model, in the order of its layers."""
    return nn.ParameterList(p for m in model.modules() if isinstance(m, LoRA) for p in (m.down, m.up))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Switch the adapters off inside the `with`: the model is the frozen one again, which costs no memory."""
    found = [module for module in model.modules() if isinstance(module, LoRA)]
    for module in found:
        module.on = False
    try:
        yield
    finally:
        for module in found:
            module.on = True


@torch.no_grad()
def merged(model: LLaDA) -> LLaDA:
    """Return a plain model that does the same. It shares every tensor with the adapted one but the merged matrices."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            state[f"{name}.weight"] = module.merged()
            del state[f"{name}.down"], state[f"{name}.up"]
    return model_of(state, model)


def model_of(state: dict[str, Tensor], like: LLaDA) -> LLaDA:
    """Return a model like another one, whose weights are the very tensors of a state dict."""
    model = blank(like.config, like.embed.vision if sees(like) else None)
    model.load_state_dict(state, assign=True)
    if like.config.tie_head:
        model.head.weight = model.embed.weight
    return model
