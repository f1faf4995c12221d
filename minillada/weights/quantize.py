"""Store weights in 8 or 4 bits, so that the 8B model fits a card of 12 or 8 GB.

The matrices of the layers and the head are stored as small numbers and scales. Where PyTorch has a product for these,
the product takes them as they are, which is faster than with weights of 16 bits when few tokens pass at a time: int4
and int8 in bfloat16 on a CPU, int4 in bfloat16 on NVIDIA GPUs since Ampere, fp8 since Ada. Elsewhere the weights are
computed again whenever they are used (PyTorch: a parametrization), which saves memory and not time; those of the head
in pieces, because all at once they take gigabytes. All of it is approximate; fp8 also rounds what the weights are
multiplied with.

The embedding stays as it is, because it is looked up and never multiplied with; so do the tower of one that
sees, norms and biases, which are small, and routers, because rounding one would send tokens to other experts.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import check_one_of
from ..model import LLaDA, MoE
from .device import capability

PIECE = 16_384  # rows of the head that are computed again at a time
FP8 = torch.float8_e4m3fn  # up to 448


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


class Packed(nn.Module):
    """Multiply as a Linear does, by a product for weights in few bits. A subclass makes the weights and the product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])  # (...,in) -> (...,out)
        return y if self.bias is None else y + self.bias


class PackedInt4(Packed):
    """Weights of `Int4` in PyTorch's own order, with w = zero + scale * (q - 8)."""

    def __init__(self, linear: nn.Linear, group: int) -> None:
        super().__init__(linear)
        packed, scale, low = Int4(group).right_inverse(linear.weight)
        q, aten = torch.cat([packed & 15, packed >> 4], dim=-1).flatten(-2), torch.ops.aten  # (out,in)
        if q.is_cuda:
            q, self.multiply = (
                aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8),
                aten._weight_int4pack_mm,
            )
        else:
            q = aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
            self.multiply = aten._weight_int4pack_mm_for_cpu
        zero = (low.float() + 8 * scale.float()).to(scale.dtype)
        self.group, both = group, torch.cat([scale, zero], dim=-1).transpose(0, 1).contiguous()  # (in/G,out,2)
        self.register_buffer("q", q)
        self.register_buffer("scale_and_zero", both)

    def product(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.q, self.group, self.scale_and_zero)


class PackedInt8(Packed):
    """Weights of `Int8`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        q, scale = Int8().right_inverse(linear.weight)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale.squeeze(-1))

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, self.q, self.scale)


class Float8(Packed):
    """Weights in 8 bits with an exponent, and a scale for each row; what they are multiplied with becomes the same."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        q, scale = to_fp8(linear.weight)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    def product(self, x: Tensor) -> Tensor:
        q, scale = to_fp8(x)
        y = torch._scaled_mm(q, self.q.t(), scale_a=scale, scale_b=self.scale.t(), out_dtype=torch.bfloat16)
        return y.to(x.dtype)


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (N,in) in fp8, and the float32 scale (N,1) of each row: its largest number becomes 448."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x / scale).to(FP8), scale


def kinds(device: str | torch.device) -> tuple[str, ...]:
    """Return in which few bits a device can hold weights."""
    return ("int8", "int4", "fp8") if capability(device) >= (8, 9) else ("int8", "int4")


def packed(linear: nn.Linear, bits: str) -> Packed | None:
    """Return what multiplies by this matrix in so few bits faster than the matrix itself does, or None."""
    (rows, columns), able, w = linear.weight.shape, capability(linear.weight.device), linear.weight
    on_cpu, half, group = w.device.type == "cpu", w.dtype == torch.bfloat16, math.gcd(columns, 64)
    if bits == "fp8" and rows % 16 == columns % 16 == 0:
        return Float8(linear)
    if bits == "int8" and half and on_cpu:
        return PackedInt8(linear)
    fits = rows % 16 == 0 and group >= 32 and (on_cpu or columns % 128 == 0)
    return PackedInt4(linear, group) if bits == "int4" and half and fits and (on_cpu or able >= (8, 0)) else None


def in_pieces(linear: nn.Linear, x: Tensor) -> Tensor:
    """Multiply x (...,in) by a matrix in few bits, of which PIECE rows at a time are computed again."""
    kept = linear.parametrizations.weight
    stored = [p.split(PIECE) for name, p in kept.named_parameters() if name.startswith("original")]
    return torch.cat([F.linear(x, kept[0](*piece)) for piece in zip(*stored, strict=True)], dim=-1)


def matrices(model: LLaDA) -> list[tuple[nn.Module, str]]:
    """List what is stored in few bits as (module, name of its weight). The head comes first: it is the largest."""
    kept = [*model.embed.parameters()] + [module.router.weight for module in model.modules() if isinstance(module, MoE)]
    found = []
    for module in reversed(list(model.modules())):
        if isinstance(module, MoE):
            found += [(module, name) for name in ("gate", "up", "down")]
        elif isinstance(module, nn.Linear) and not any(module.weight is weight for weight in kept):
            found.append((module, "weight"))
    return found


def quantize(model: LLaDA, bits: str, device: str | torch.device | None = None) -> LLaDA:
    """Turn the model's matrices into "int8", "int4" or, on a GPU that multiplies it, "fp8", in place, each moved to the
    device first, which needs room for the result plus one matrix. After that it cannot be trained, saved, moved or
    quantized. Raises BadInput."""
    check_one_of("quantize", bits, kinds(device or model.embed.weight.device))
    model.requires_grad_(False)
    places = {child: (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    for module, name in matrices(model):
        module.to(device)
        if isinstance(module, nn.Linear) and (quick := packed(module, bits)):
            setattr(*places[module], quick)
            continue
        group = math.gcd(getattr(module, name).shape[-1], 64)  # 64, 32 or 16, or the matrix is stored in 8 bits
        kind = Int4(group) if bits == "int4" and group >= 16 else Int8()
        parametrize.register_parametrization(module, name, kind, unsafe=True)  # unsafe: no trial run
        if module is model.head:
            module.forward = partial(in_pieces, module)
    return model.to(device)


def memory(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers; a shared one counts once."""
    return sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
