"""One denoising step, in small pure functions: draw a token, score it, choose how many to commit; and guidance.

Every table below maps the name a user writes to a function; "name:0.9" gives the function its parameter. A new rule is
one function and one line in a table. Shapes: N holes asked about, V vocabulary, B batch, R rows of the batch that still
have holes, W window.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .errors import BadInput, check_number, check_one_of

# ---- draw: logits (N,V) -> tokens (N,) ------------------------------------------------------------------------------


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, rng: Generator) -> Tensor:
    """Sample from softmax(logits / temperature), cut to the top k ids or to the smallest set of probability p.

    Gumbel's trick in two rounds: which group of about sqrt(V) ids, by the logarithm of its mass, and which id of that
    group. The same distribution as in one round, for 2 sqrt(V) noises a hole and not V. Temperature 0: the argmax.
    """
    if top_k and temperature:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1 and temperature:
        ordered, ids = logits.sort(descending=True)
        probability = (ordered.double() / temperature).softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # never the most probable one
        logits = logits.masked_fill(beyond.scatter(-1, ids, beyond), -torch.inf)
    if logits.device.type == "mps":  # Apple's GPUs have no float64
        logits = logits.cpu()
    size = logits.shape[-1]
    width = next(width for width in range(math.isqrt(size), 0, -1) if size % width == 0)
    groups = logits.unflatten(-1, (-1, width))  # (N,G,width)
    mass = groups.amax(-1)  # (N,G)
    if temperature:
        below = groups - mass.clamp(min=torch.finfo(mass.dtype).min)[..., None]  # a group may be all -inf
        mass = mass.double() + temperature * below.div_(temperature).exp_().sum(-1).double().log()
    group = gumbel_argmax(mass, temperature, rng)
    inside = groups[torch.arange(len(group), device=group.device), group]  # (N,width)
    return group * width + gumbel_argmax(inside, temperature, rng)


def gumbel_argmax(logits: Tensor, temperature: float, rng: Generator) -> Tensor:
    """(N,K) -> an index each (N,), from softmax(logits / temperature): the argmax of logits + temperature * noise.

    In float64: in float32 the noise has no tail above 16.6, a temperature lowered in secret (arXiv:2409.02908).
    """
    if not temperature:
        return logits.argmax(-1)
    noise = -torch.empty(logits.shape, dtype=torch.float64, device=rng.device).exponential_(generator=rng).log()
    return (logits.double() + temperature * noise.to(logits.device)).argmax(-1)


# ---- score: logits (N,V), tokens (N,) -> confidence (N,), the higher the surer --------------------------------------


def probability(logits: Tensor, tokens: Tensor, rng: Generator) -> Tensor:
    """The probability of the token drawn, without noise: "low-confidence remasking" (LLaDA, algorithm 5)."""
    return logits.softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


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


Score = Callable[[Tensor, Tensor, Generator], Tensor]

SCORES: dict[str, Score] = {
    "low_confidence": probability,
    "random": chance,
    "margin": margin,
    "entropy": negative_entropy,
}

# ---- commit: how many of the surest holes? --------------------------------------------------------------------------


class Now(NamedTuple):
    """What a rule may look at, of the rows that are being written."""

    hole: Tensor  # (R,W) bool
    held: Tensor  # (R,W): how sure a token of ours was when it was committed; NaN for holes and for given tokens
    left: int  # of the window's steps, this one included
    steps: int
    rng: Generator

    def holes(self) -> Tensor:
        return self.hole.sum(1)  # (R,)

    def uniform(self) -> Tensor:
        """(R,W) between 0 and 1."""
        return torch.rand(self.hole.shape, generator=self.rng, device=self.rng.device).to(self.hole.device)


# A rule sees each row's confidence (R,W) in falling order, -inf past its last hole, and answers with a number (R,).
# In a window's last step the sampler does not ask: it commits all.
Rule = Callable[[Tensor, Now], Tensor]


class Method(NamedTuple):
    """How a window is decoded. Made anew for every window, so that it may remember what it saw."""

    commit: Rule
    blind: bool = False  # the rule does not look at the confidence: it can say beforehand how many are due
    revise: Callable[[Now], Tensor] | None = None  # which committed tokens become holes again, (R,W) bool
    watch: Callable[..., Callable] | None = None  # (denoise, window, mask_id) -> denoise: to see more than the logits
    score: Score | None = None  # in place of the one that remasking names


def quota() -> Method:
    """The same number every step: holes left over steps left, rounded up. Equals the paper's precomputed table."""
    return Method(lambda _, now: (now.holes() + now.left - 1) // now.left, blind=True)


def threshold(tau: float = 0.9) -> Method:
    """All that are at least this sure, and always the surest (Fast-dLLM, arXiv:2505.22618)."""
    return Method(lambda confidence, now: (confidence >= tau).sum(1).clamp(min=1))


def factor(f: float = 1.0) -> Method:
    """The largest n whose n-th confidence is at least 1 - f / (n + 1) (Fast-dLLM, from its theorem 1)."""

    def rule(confidence: Tensor, now: Now) -> Tensor:
        n = torch.arange(1, confidence.shape[1] + 1, device=confidence.device)
        return ((confidence >= 1 - f / (n + 1)) * n).amax(1).clamp(min=1)

    return Method(rule)


def entropy_bound(gamma: float = 0.1) -> Method:
    """The most whose entropies, but for the largest, add up to gamma nats at most (EB, arXiv:2505.24857)."""

    def rule(confidence: Tensor, now: Now) -> Tensor:
        entropy = -confidence  # in rising order, so the largest so far is the last
        others = F.pad(entropy, (1, 0)).cumsum(1)[:, :-1]  # what the smaller ones add up to
        return (others <= gamma).sum(1).minimum(now.holes())

    return Method(rule)


def ancestral() -> Method:
    """Each hole by itself with probability 1 - s/t = 1/left on an even grid (LLaDA, eq. 10): with remasking "random",
    temperature 1 and one window the exact reverse process as the steps grow. The only rule that may commit none."""
    return Method(lambda _, now: ((now.uniform() < 1 / now.left) & now.hole).sum(1), blind=True)


def first_hitting() -> Method:
    """One at a time: with remasking "random", temperature 1 and one window an exact sample (arXiv:2409.02908)."""
    return Method(lambda _, now: torch.ones_like(now.holes()), blind=True)


RULES: dict[str, Callable[..., Method]] = {
    "quota": quota,
    "threshold": threshold,
    "factor": factor,
    "entropy-bound": entropy_bound,
    "ancestral": ancestral,
    "first-hitting": first_hitting,
}


def named(table: dict[str, Callable], what: str, spec: str) -> Callable:
    """What a user calls "name" or "name:parameter,parameter", the parameters filled in. Raises BadInput."""
    name, colon, given = spec.partition(":")
    check_one_of(what, name, table)
    takes = list(inspect.signature(table[name]).parameters)
    texts = given.split(",") if colon else []
    if len(texts) > len(takes):
        few = f"at most {len(takes)} parameters ({', '.join(takes)})" if takes else "no parameter"
        raise BadInput(f"{what}: expected {name} with {few}, got {spec!r}; leave out the rest")
    values = []
    for parameter, text in zip(takes, texts, strict=False):
        try:
            values.append(int(text) if text.strip().isdecimal() else float(text))
        except ValueError:
            values.append(text)  # no number: refused in the next line
        check_number(f"{what} {name}, {parameter}", values[-1])
    return table[name](*values)


# ---- guidance -------------------------------------------------------------------------------------------------------


def guided(model: Callable[..., Tensor], scale: float, given: Tensor, mask_id: int) -> Callable[..., Tensor]:
    """Classifier-free guidance: logits + scale * (logits - logits without the prompt) (LLaDA, eq. 16; SMDM).

    The same rows with the whole prompt masked ride along in one batch of 2B. given: (B,T), the prompt's positions.
    """

    def denoise(x: Tensor, attn_mask: Tensor | None, positions: Tensor, where: tuple, cache=None) -> Tensor:
        both = torch.cat([x, x.masked_fill(given[:, positions], mask_id)])
        mask = None if attn_mask is None else torch.cat([attn_mask, attn_mask])
        row, column = where
        twice = torch.cat([row, row + len(x)]), torch.cat([column, column])
        logits = model(both, mask, positions, twice, cache)
        conditional, unconditional = logits.chunk(2)
        return conditional + scale * (conditional - unconditional)

    return denoise
