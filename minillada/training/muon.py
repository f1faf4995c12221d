"""Muon (arXiv:2502.16982, with the scale of its first publication): every update of a matrix is made orthogonal.

PyTorch's takes one polynomial five times to bring singular values near 1. Here three are enough, as each is the best
for where the one before leaves them (Polar Express, arXiv:2505.16932, theorem 4.1). N matrices of one shape go through
their products together, in bfloat16 only where the device has instructions for it: else it is emulated and slow.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

# (a, b, c) of s -> a s + b s^3 + c s^5, one after the other: s from 0.01 to 1 ends between 0.73 and 1.27
POLYNOMIALS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


def orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x (N,rows,columns) with its singular values near 1, by polynomials of its products in this dtype."""
    wide = x.shape[1] <= x.shape[2]
    y = (x if wide else x.mT).to(dtype, copy=True)
    y /= y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in POLYNOMIALS:
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y if wide else y.mT


class Muon(Optimizer):
    """Step along the orthogonal matrix nearest to the gradient's momentum (Nesterov's, 0.95)."""

    def __init__(self, params: list[dict], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for (rows, columns), params in alike.items():
                updates = orthogonal(torch.stack(self.momenta(params)), self.dtype).unbind()
                if isinstance(params[0], DTensor):  # sharded: every process has the whole update and takes its part
                    place = {"device_mesh": params[0].device_mesh, "placements": params[0].placements}
                    updates = [distribute_tensor(update, **place, src_data_rank=None) for update in updates]
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def momenta(self, params: list[Tensor]) -> list[Tensor]:
        """Add the gradients to the momenta of matrices, and return where both lead to, put together if sharded."""
        buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(buffers, grads, 0.05)
        return [ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
                for ahead in torch._foreach_lerp(grads, buffers, 0.95)]  # fmt: skip
