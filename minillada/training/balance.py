"""Keep the experts of a mixture busy: losses that balance them, biases that are moved, and a report of the routing.

Of the N tokens that a layer routes, masked and visible alike, each visits K of E experts; none is ever dropped. The
load of an expert is its share of the N*K visits, 1/E when balanced; it is counted and has no gradient. P has one: the
probability that the router gives to each expert.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.distributed import ReduceOp

from ..errors import BadInput
from ..model import MoE
from ..train import Objective
from .config import RunConfig
from .distributed import reduce


class Routing(NamedTuple):
    """Hold where one layer sent the tokens of one evaluation."""

    moe: MoE
    logits: Tensor  # (N,E) float32, the router's; N may be 0
    experts: Tensor  # (N,K) long

    def visits(self) -> Tensor:
        """Count the tokens that visited each expert, (E,)."""
        return self.experts.flatten().bincount(minlength=self.moe.c.n_expert)

    def probabilities(self) -> Tensor:
        """Return P of every token, (N,E): the softmax, or the sigmoids made to sum to one, both without the bias."""
        if self.moe.c.router == "softmax":
            return self.logits.softmax(-1)
        return self.logits.sigmoid() / self.logits.sigmoid().sum(-1, keepdim=True)

    def mean(self, per_token: Tensor) -> Tensor:
        """Return the mean over tokens (N,...), 0 for none."""
        return per_token.sum(0) / max(1, len(self.logits))


@contextmanager
def watch_routing(model: nn.Module, valid: Tensor | None = None) -> Iterator[list[Routing]]:
    """Watch the evaluations inside the `with`; then the list has a Routing for each of them and every MoE layer. Raises
    BadInput if none was seen, as in a compiled model. Call backward after it: recomputing evaluates layers again.
    Padding, where valid (B,T) is False, is routed but does not count; the places of `model(x, where=...)` all count."""
    seen: list[tuple[MoE, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    hooks = [moe.router.register_forward_hook(lambda *call, moe=moe: seen.append((moe, call[-1]))) for moe in layers]
    found: list[Routing] = []
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    if layers and not seen:
        raise BadInput("routing: expected an evaluation to watch, got none or a compiled one; leave compile out")
    for moe, logits in seen:
        if valid is not None and len(logits) == valid.numel():
            logits = logits[valid.flatten()]
        found.append(Routing(moe, logits, moe.route(logits.detach())[1]))


def balance_loss(r: Routing) -> Tensor:
    """Return E * sum over experts of f_e P_e, f_e the share of the tokens that visit e (arXiv:2101.03961, eq. 4). As in
    LLaDA-MoE's code f is not divided by K: K if balanced; E, the largest, if all tokens visit the same K experts."""
    return r.moe.c.n_expert * r.visits() / max(1, len(r.experts)) @ r.mean(r.probabilities())


def z_loss(r: Routing) -> Tensor:
    """Return the mean of logsumexp(logits)^2, which keeps logits small (arXiv:2202.08906, eq. 5)."""
    return r.mean(r.logits.logsumexp(-1).square())


def auxiliary_loss(routings: list[Routing], balance: float, z: float) -> Tensor | float:
    """Return both of these losses times their coefficients, averaged over layers; 0 without any layer."""
    return sum(balance * balance_loss(r) + z * z_loss(r) for r in routings) / max(1, len(routings))


def loads(routings: list[Routing]) -> dict[MoE, Tensor]:
    """Return each layer's share of visits by expert (E,), over all evaluations and processes. It sums to one."""
    visits: dict[MoE, Tensor] = {}
    for r in routings:
        visits[r.moe] = visits.get(r.moe, 0) + r.visits()
    total = reduce(torch.stack(list(visits.values())), ReduceOp.SUM)
    return dict(zip(visits, total / total.sum(1, keepdim=True).clamp(min=1), strict=True))


@torch.no_grad()
def move_biases(routings: list[Routing], rate: float) -> None:
    """Balance without a loss (arXiv:2408.15664): raise by `rate` the bias of an expert whose load is below 1/E, lower
    that of one above. The bias picks experts and does not weigh them. Raises BadInput for a router without one."""
    for moe, load in loads(routings).items():
        if moe.c.router != "sigmoid":
            raise BadInput(f"bias_rate: expected 0 for a {moe.c.router} router without biases, got {rate}; use balance")
        moe.router_bias += rate * (1 / moe.c.n_expert - load).sign()


@torch.no_grad()
def routing_report(routings: list[Routing]) -> dict:
    """Return numbers for a log; {} for a dense model. Losses are means over layers, without coefficients; load is by
    layer and expert; imbalance is the largest load over 1/E; router_entropy is that of P by layer, in nats."""
    if not routings:
        return {}
    shares, entropies = loads(routings), {}
    for r in routings:
        entropies.setdefault(r.moe, []).append(r.mean(torch.special.entr(r.probabilities()).sum(-1)).item())
    return {
        "balance_loss": auxiliary_loss(routings, 1.0, 0.0).item(),
        "z_loss": auxiliary_loss(routings, 0.0, 1.0).item(),
        "imbalance": max(len(load) * load.max().item() for load in shares.values()),
        "router_entropy": [round(sum(values) / len(values), 4) for values in entropies.values()],
        "load": [[round(share, 4) for share in load.tolist()] for load in shares.values()],
    }


class Balanced:
    """Wrap an objective so that its gradient balances experts too. The loss that is reported stays the objective's."""

    def __init__(self, objective: Objective, config: RunConfig) -> None:
        self.objective, self.config = objective, config
        self.batches, self.validate = objective.batches, objective.validate
        self.numbers: dict = {}  # of the objective, and `routing_report`
        self.progress = 0.0
        self.routings: list[Routing] = []  # of the last batch

    def losses(self, model: nn.Module, batch: Any, rng: Generator) -> Iterator[Tensor]:
        """Yield the objective's parts, with the gradient of the balancing losses added."""
        self.objective.progress = self.progress
        parts, self.routings = self.objective.losses(model, batch, rng), []
        while True:
            try:
                with watch_routing(model) as seen:
                    part = next(parts)
            except StopIteration:
                break
            learning = [r for r in seen if r.logits.requires_grad]  # and not the evaluation of a reference
            extra = auxiliary_loss(learning, self.config.balance, self.config.z_loss) / self.config.accumulate
            self.routings += [r._replace(logits=r.logits.detach()) for r in learning]
            yield part + (extra - extra.detach())
        self.numbers = self.objective.numbers | routing_report(self.routings)
