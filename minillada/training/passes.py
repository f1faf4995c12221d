"""Train in bfloat16 with fewer passes over memory, on a CPU: the same by operations with a backward pass of their own.

There PyTorch computes RMSNorm and the rotation in many small operations, in float32, and each reads and writes a whole
tensor, in the backward pass too; then the result is rounded for each product that follows. Here each is one operation,
rounded once, with its derivative by hand. In float32 nothing was gained, so there, and in every evaluation, the model
computes as `model.py` says.
"""

import ctypes
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..model import Around, Attention, LLaDA, attend


class Normed(Function):
    """Compute RMSNorm: y = n w with n = x r and r = 1 / sqrt(mean(x^2) + eps), for x (...,C) and w (C,).

    With a gradient g of y:  dx = r (g w - n mean(g w n)),  dw = the sum of g n over all places.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, weight.dtype))
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        r = square.div_(x.shape[-1]).add_(eps).rsqrt_()  # (...,1)
        n = x * r
        ctx.save_for_backward(n, r, weight)
        return (n * weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        n, r, weight = ctx.saved_tensors
        gn = (g * n).flatten(0, -2)  # (N,C)
        mean = torch.mv(gn, weight).div_(len(weight)).view_as(r)
        return torch.addcmul(g * weight, n, mean, value=-1).mul_(r), gn.sum(0), None, None


class Turned(Function):
    """Turn heads x (B,H,T,D) as `rotate` does. The derivative turns the gradient back, by the opposite angle."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return turn(g, cos, -sin), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `rotate(x, cos, sin)`, computed in place in a copy."""
    turned, half = x.to(cos.dtype, copy=True), cos.shape[-1]
    a, b = turned[..., :half], turned[..., half : 2 * half]
    moved = a * sin
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(moved)
    return turned.to(x.dtype)


def learning() -> bool:
    """Return whether this is a training pass in bfloat16."""
    return torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")


def normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Do what an RMSNorm does. Its result has the dtype of the products that follow."""
    if not learning():
        return nn.RMSNorm.forward(norm, x)
    return Normed.apply(x, norm.weight, norm.eps, torch.get_autocast_dtype("cpu"))


def attention(attn: Attention, x: Tensor, around: Around) -> Tensor:
    """Do what `Attention` does."""
    if not learning():
        return Attention.forward(attn, x, around)
    q, k = (Turned.apply(norm(attn.heads(project(x))), *around.rotary)
            for project, norm in ((attn.q, attn.q_norm), (attn.k, attn.k_norm)))  # fmt: skip
    return attend(q, k, attn.heads(attn.v(x)), around.attn_mask).transpose(1, 2).flatten(2)


def keep_memory() -> None:
    """Have the GNU C library keep freed memory for the next step. It would give large pieces back to the system, which
    hands them out again page by page, filled with zeros: 6,000 page faults in a step of `tiny`."""
    with suppress(OSError, TypeError, AttributeError):  # another C library
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**30)


def hasten(model: LLaDA) -> LLaDA:
    """Have a model on a CPU train in less time, in place: norms and attention as above, and memory that is kept."""
    keep_memory()
    for module in model.modules():
        if type(module) is nn.RMSNorm:
            module.forward = partial(normed, module)
        elif type(module) is Attention:
            module.forward = partial(attention, module)
    return model
