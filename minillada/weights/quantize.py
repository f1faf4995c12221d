"""Store weights in 8 or 4 bits, so that the 8B model fits a card of 12 or 8 GB. This saves memory, not time.

The matrices of the layers and the head are stored as small whole numbers and scales, and computed again whenever they
are used (PyTorch: a parametrization). The embedding is not, because it is looked up and never multiplied with; nor are
norms and biases, which are small, nor routers, because rounding one would send tokens to other experts.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import check_one_of
from ..model import LLaDA, MoE


class Int8(nn.Module):
    """Weights in 8 bits with a scale for each row: w = scale * q, q from -127 to 127."""

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Store w (...,in) as q (...,in) int8 and scale (...,1)."""
        scale = (w.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(w.dtype).tiny)
        return w.to(torch.float32, copy=True).div_(scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale

    def forward(self, q: Tensor, scale: Tensor) -> Tensor:
        """Compute w (...,in) again."""
        return q * scale


class Int4(nn.Module):
    """Weights in 4 bits (4.5 with scale and low) in groups of up to 64: w = low + scale * q, q from 0 to 15."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store w (...,in) as packed (...,in/G,G/2) uint8, scale and low (...,in/G,1)."""
        w = w.unflatten(-1, (-1, self.group))
        low, high = w.aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=torch.finfo(w.dtype).tiny)
        q = w.to(torch.float32, copy=True).sub_(low.float()).div_(scale.float()).round_().clamp_(0, 15).to(torch.uint8)
        first, second = q.chunk(2, dim=-1)
        return first | second << 4, scale, low  # two q in a byte

    def forward(self, packed: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        """Compute w (...,in) again."""
        q = torch.cat([packed & 15, packed >> 4], dim=-1)  # (...,in/G,G)
        return torch.addcmul(low, q.to(low.dtype), scale).flatten(-2)


def matrices(model: LLaDA) -> list[tuple[nn.Module, str]]:
    """List what is stored in few bits as (module, name of its weight). The head comes first: it is the largest."""
    kept = [model.embed.weight] + [module.router.weight for module in model.modules() if isinstance(module, MoE)]
    found = []
    for module in reversed(list(model.modules())):
        if isinstance(module, MoE):
            found += [(module, name) for name in ("gate", "up", "down")]
        elif isinstance(module, nn.Linear) and not any(module.weight is weight for weight in kept):
            found.append((module, "weight"))
    return found


def quantize(model: LLaDA, bits: str, device: str | torch.device | None = None) -> LLaDA:
    """Turn the model's matrices into "int8" or "int4" in place, each moved to the device first, which needs room for
    the result plus one matrix. It cannot be trained, saved or quantized again. Raises BadInput."""
    check_one_of("quantize", bits, ("int8", "int4"))
    model.requires_grad_(False)
    for module, name in matrices(model):
        module.to(device)
        group = math.gcd(getattr(module, name).shape[-1], 64)  # 64, 32 or 16, or the matrix is stored in 8 bits
        kind = Int4(group) if bits == "int4" and group >= 16 else Int8()
        parametrize.register_parametrization(module, name, kind, unsafe=True)  # unsafe: no trial run
    return model.to(device)


def memory(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers; a shared one counts once."""
    return sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
