"""One denoising step, in small pure functions: draw a token, score it, choose how many to commit; and guidance.

Every table below maps the name a user writes to a function; "name:0.9" gives the function its parameter. A new rule is
one function and one line in a table. Shapes: N holes asked about, V vocabulary, B batch, W window.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from .errors import BadInput, check_number, check_one_of

# ---- draw: logits (N,V) -> tokens (N,) ------------------------------------------------------------------------------


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, rng: Generator) -> Tensor:
    """Sample from softmax(logits / temperature), cut to the top k ids or to the smallest set of probability p.

    Gumbel's trick, argmax(logits + temperature * noise), in float64: in float32 the noise has no tail above 16.6, which
    silently lowers the temperature (arXiv:2409.02908). Temperature 0 is the argmax.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, ids = logits.sort(descending=True)
        probability = (ordered.double() / temperature).softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # never the most probable one
        logits = logits.masked_fill(beyond.scatter(-1, ids, beyond), -torch.inf)
    noise = -torch.empty(logits.shape, dtype=torch.float64, device=rng.device).exponential_(generator=rng).log()
    if logits.device.type == "mps":  # Apple's GPUs have no float64
        logits = logits.cpu()
    return (logits.double() + temperature * noise).argmax(-1)


# ---- score: logits (N,V), tokens (N,) -> confidence (N,), the higher the surer --------------------------------------


def probability(logits: Tensor, tokens: Tensor, rng: Generator) -> Tensor:
    """The probability of the token drawn, without noise: "low-confidence remasking" (LLaDA, algorithm 5)."""
    return (logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)).exp()


def chance(logits: Tensor, tokens: Tensor, rng: Generator) -> Tensor:
    """No preference: "random remasking" (LLaDA, algorithm 4)."""
    return torch.rand(len(tokens), generator=rng, device=rng.device).to(logits.device)


def margin(logits: Tensor, tokens: Tensor, rng: Generator) -> Tensor:
    """The lead of the most probable token over the second (arXiv:2502.06768)."""
    best = logits.softmax(-1).topk(2).values
    return best[:, 0] - best[:, 1]


def negative_entropy(logits: Tensor, tokens: Tensor, rng: Generator) -> Tensor:
    """Minus the entropy in nats."""
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)  # 0 * -inf counts as 0


SCORES: dict[str, Callable[[Tensor, Tensor, Generator], Tensor]] = {
    "low_confidence": probability,
    "random": chance,
    "margin": margin,
    "entropy": negative_entropy,
}

# ---- commit: how many of the surest holes? --------------------------------------------------------------------------
# A rule sees each row's confidence (B,W) in falling order, -inf past its last hole, and how many of the window's steps
# are left, this one included. It answers with a number (B,). In a window's last step the sampler commits all anyway.

Rule = Callable[[Tensor, int, int, Generator], Tensor]  # (confidence, left, steps, rng) -> (B,) long


def holes(confidence: Tensor) -> Tensor:
    return (confidence > -torch.inf).sum(1)


def quota() -> Rule:
    """The same number every step: holes left over steps left, rounded up. Equals the paper's precomputed table."""
    return lambda confidence, left, steps, rng: (holes(confidence) + left - 1) // left


def threshold(tau: float = 0.9) -> Rule:
    """All that are at least this sure, and always the surest (Fast-dLLM, arXiv:2505.22618)."""
    return lambda confidence, left, steps, rng: (confidence >= tau).sum(1).clamp(min=1)


def factor(f: float = 1.0) -> Rule:
    """The largest n whose n-th confidence is at least 1 - f / (n + 1) (Fast-dLLM, from its theorem 1)."""

    def rule(confidence: Tensor, left: int, steps: int, rng: Generator) -> Tensor:
        n = torch.arange(1, confidence.shape[1] + 1, device=confidence.device)
        return ((confidence >= 1 - f / (n + 1)) * n).amax(1).clamp(min=1)

    return rule


def entropy_bound(gamma: float = 0.1) -> Rule:
    """The most whose entropies, but for the largest, add up to gamma nats at most (EB, arXiv:2505.24857).

    Wants remasking "entropy".
    """

    def rule(confidence: Tensor, left: int, steps: int, rng: Generator) -> Tensor:
        entropy = -confidence  # in rising order, so the largest so far is the last
        return (entropy.cumsum(1) - entropy <= gamma).sum(1).minimum(holes(confidence))

    return rule


def ancestral() -> Rule:
    """Each hole by itself with probability 1 - s/t = 1/left on an even grid (LLaDA, eq. 10): the exact reverse process
    as the steps grow. Wants remasking "random" and temperature 1; the only rule that may commit none."""

    def rule(confidence: Tensor, left: int, steps: int, rng: Generator) -> Tensor:
        u = torch.rand(confidence.shape, generator=rng, device=rng.device).to(confidence.device)
        return ((u < 1 / left) & (confidence > -torch.inf)).sum(1)

    return rule


def first_hitting() -> Rule:
    """One at a time: with remasking "random" and temperature 1 an exact sample (arXiv:2409.02908)."""
    return lambda confidence, left, steps, rng: torch.ones_like(confidence[:, 0], dtype=torch.long)


COMMITS: dict[str, Callable[..., Rule]] = {
    "quota": quota,
    "threshold": threshold,
    "factor": factor,
    "entropy-bound": entropy_bound,
    "ancestral": ancestral,
    "first-hitting": first_hitting,
}


def named(table: dict[str, Callable], what: str, spec: str) -> Rule:
    """The rule that a user calls "name" or "name:parameter"."""
    name, colon, parameter = spec.partition(":")
    check_one_of(what, name, table)
    takes = inspect.signature(table[name]).parameters
    if not colon:
        return table[name]()
    if not takes:
        raise BadInput(f"{what}: expected {name} without a parameter, got {spec!r}; leave out {colon + parameter!r}")
    try:
        value = float(parameter)
    except ValueError:
        value = parameter  # no number: refused below
    check_number(f"{what} {name}", value)
    return table[name](value)


# ---- guidance -------------------------------------------------------------------------------------------------------


def guided(model: Callable[..., Tensor], scale: float, given: Tensor, mask_id: int) -> Callable[..., Tensor]:
    """Classifier-free guidance: logits + scale * (logits - logits without the prompt) (LLaDA, eq. 16; SMDM).

    The same rows with the whole prompt masked ride along in one batch of 2B. given: (B,T), the prompt's positions.
    """

    def denoise(x: Tensor, attn_mask: Tensor | None, positions: Tensor, keep: Tensor, cache=None) -> Tensor:
        both = torch.cat([x, x.masked_fill(given[:, positions], mask_id)])
        mask = None if attn_mask is None else torch.cat([attn_mask, attn_mask])
        logits = model(both, mask, positions, torch.cat([keep, keep + x.numel()]), cache)
        conditional, unconditional = logits.chunk(2)
        return conditional + scale * (conditional - unconditional)

    return denoise
