"""Masked diffusion: how text is noised, and the bound on its likelihood that predicting the noise away gives.

Forward process (LLaDA, arXiv:2502.09992, eq. 7): every token of x0 becomes [MASK] with probability p_mask(t), apart
from the others; t in (0,1] is the masking level. The bound (eq. 12), in nats, with CE_i = -log p(x0_i | xt):

    -log p(x0)  <=  E_t E_xt [ weight(t) * sum of CE_i over the masked i ]

Two other expressions of the same number have less variance per sample and are here too: the number of masked tokens
drawn first (eq. 14), and, for short answers, the sum over all masks (`exact_bound`).

Shapes: B batch, T sequence, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .errors import BadInput


class Noised(NamedTuple):
    """A noised batch: the tokens, which of them were masked, and what a masked token's cross-entropy counts."""

    xt: Tensor  # (B,T) long
    masked: Tensor  # (B,T) bool
    weight: Tensor  # (B,) float32, so that weight * sum of CE is an unbiased estimate of the bound

    def to(self, device: torch.device | str) -> "Noised":
        return Noised(*(x.to(device) for x in self))


def sample_t(n: int, rng: Generator, stratified: bool = True) -> Tensor:
    """n masking levels (n,) in (0,1]: independent, or one from each of n equal slices (MDLM's "antithetic")."""
    u = torch.rand(n, generator=rng)
    return 1 - ((torch.arange(n) + u) / n if stratified else u)


def linear(t: Tensor) -> tuple[Tensor, Tensor]:
    """LLaDA's schedule, alpha = 1 - t: (p_mask, weight) = (t, 1/t)."""
    return t, 1 / t


def cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    """MD4's, alpha = 1 - cos(pi/2 (1-t)): fewer nearly empty inputs (arXiv:2406.04329, table 1)."""
    angle = math.pi / 2 * (1 - t)
    return angle.cos(), math.pi / 2 * angle.tan()


# name -> t -> (p_mask = 1 - alpha, weight = -alpha' / (1 - alpha)). The bound is the same for all, its variance is not.
SCHEDULES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"linear": linear, "cosine": cosine}


def bernoulli(
    x0: Tensor, mask_id: int, t: Tensor, rng: Generator, maskable: Tensor | None = None, schedule: str = "linear"
) -> Noised:
    """Each maskable token of x0 (B,T) is masked with probability p_mask(t), t (B,): LLaDA's guidelines.

    The level is kept above 1/1000, where the weight explodes: it changes the bound by less than 0.1 %.
    """
    p_mask, weight = SCHEDULES[schedule](t.clamp(min=1e-3))
    masked = torch.rand(x0.shape, generator=rng) < p_mask[:, None]
    masked = masked if maskable is None else masked & maskable
    return Noised(x0.masked_fill(masked, mask_id), masked, weight)


def bernoulli_mean(x0: Tensor, mask_id: int, t: Tensor, rng: Generator, maskable: Tensor | None = None) -> Noised:
    """`bernoulli` with 1/t replaced by its mean over all t that could have masked as many: (L+1)/m for m of L.

    Averaged over rows, CE's mean over a row's own masked tokens is this, up to rows with m = 0.
    """
    noised = bernoulli(x0, mask_id, t, rng, maskable)
    length = lengths(x0, maskable)
    return noised._replace(weight=(length + 1) / noised.masked.sum(1).clamp(min=1))


def exact_count(x0: Tensor, mask_id: int, t: Tensor, rng: Generator, maskable: Tensor | None = None) -> Noised:
    """Exactly l = ceil(t L) of a row's L maskable tokens are masked, at random; weight L/l (eq. 14)."""
    length = lengths(x0, maskable)
    count = (t.double() * length).ceil().long().clamp(min=1).minimum(length)
    order = torch.rand(x0.shape, generator=rng)
    order = order if maskable is None else order.masked_fill(~maskable, 2.0)
    masked = order.argsort(1).argsort(1) < count[:, None]
    return Noised(x0.masked_fill(masked, mask_id), masked, length / count.clamp(min=1))


def lengths(x0: Tensor, maskable: Tensor | None) -> Tensor:
    """How many tokens of each row may be masked, (B,)."""
    return torch.full((len(x0),), x0.shape[1]) if maskable is None else maskable.sum(1)


PROCESSES: dict[str, Callable[..., Noised]] = {
    "exact-count": exact_count,
    "bernoulli-mean": bernoulli_mean,
    "bernoulli": bernoulli,
}


def nll_bound(logits: Tensor, x0: Tensor, noised: Noised) -> Tensor:
    """One-sample estimate (B,) of the upper bound on -log p(x0), in nats per row.

    logits: (B,T,V), or (N,V) for the N masked positions alone in reading order (`model(xt, keep=...)`).
    """
    row, column = noised.masked.nonzero(as_tuple=True)
    logits = logits[row, column] if logits.dim() == 3 else logits
    nats = F.cross_entropy(logits.float(), x0[row, column], reduction="none")  # float32 whatever the model computes in
    return torch.zeros(len(x0), device=x0.device).index_add(0, row, nats * noised.weight[row])


def model_bound(model: nn.Module, x0: Tensor, noised: Noised, attn_mask: Tensor | None = None) -> Tensor:
    """`nll_bound` of a model, which computes logits for the masked positions only."""
    keep = noised.masked.flatten().nonzero().squeeze(1)
    return nll_bound(model(noised.xt, attn_mask=attn_mask, keep=keep), x0, noised)


def pretraining_loss(model: nn.Module, x0: Tensor, noised: Noised) -> Tensor:
    """The bound in nats per token, averaged over rows: what `train` minimises (LLaDA, eq. 3)."""
    return model_bound(model, x0, noised).mean() / x0.shape[1]


def random_length(x0: Tensor, rng: Generator, share: float = 0.01) -> Tensor:
    """Cut 1 % of the batches to a random length, so that short inputs are familiar too (LLaDA, section 2.2)."""
    cut, length = torch.rand(2, generator=rng).tolist()
    return x0[:, : 1 + int(length * x0.shape[1])] if cut < share else x0


def check_pair(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> None:
    c = model.config
    if len(answer) == 0:
        raise BadInput("answer: expected at least one token, got none; a likelihood needs something to predict")
    if len(prompt) + len(answer) > c.max_len:
        raise BadInput(f"prompt + answer: expected at most {c.max_len} tokens, got {len(prompt) + len(answer)}; cut it")
    for token in (*prompt, *answer):
        if not 0 <= token < c.vocab_size or token == c.mask_id:
            raise BadInput(f"token: expected 0 to {c.vocab_size - 1} and not the mask, got {token}; use its tokenizer")


def noised_rows(model: nn.Module, pairs: Iterable, n_samples: int, seed: int) -> Iterator[tuple]:
    """Every pair n_samples times: (x0, xt, masked, weight), counts of masks in equal strata."""
    rng = Generator().manual_seed(seed)
    for prompt, answer in pairs:
        check_pair(model, prompt, answer)
        x0 = torch.tensor([[*prompt, *answer]]).expand(n_samples, -1)
        maskable = (torch.arange(x0.shape[1]) >= len(prompt)).expand_as(x0)
        noised = exact_count(x0, model.config.mask_id, sample_t(n_samples, rng), rng, maskable)
        for j in range(n_samples):
            yield x0[j], noised.xt[j], noised.masked[j], noised.weight[j]


@torch.no_grad()
def log_likelihoods(
    model: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    n_samples: int = 128,
    seed: int = 0,
    batch_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Monte-Carlo estimates of the lower bound of log p(answer | prompt), in nats, for unequal (prompt, answer) pairs.

    Returns the estimates and their standard errors, (N,) each; the errors are those of independent samples, a little
    too large for the stratified ones taken here. The prompt is never masked. LLaDA, eq. 14 and algorithm 3.
    """
    device = next(model.parameters()).device
    rows, bounds = noised_rows(model, pairs, n_samples, seed), []
    while batch := list(islice(rows, batch_size)):
        x0, xt, masked, weight = zip(*batch, strict=True)
        valid = pad_sequence([torch.ones_like(m) for m in masked], batch_first=True).to(device)
        noised = Noised(pad_sequence(xt, True), pad_sequence(masked, True), torch.stack(weight)).to(device)
        attn_mask = None if valid.all() else valid[:, None, None, :]
        bounds.append(model_bound(model, pad_sequence(x0, True).to(device), noised, attn_mask).cpu())
    samples = -torch.cat(bounds).double().view(-1, n_samples)  # (N,n_samples): rows come pair by pair
    error = samples.std(1) / n_samples**0.5 if n_samples > 1 else torch.full((len(samples),), torch.nan)
    return samples.mean(1), error


def log_likelihood(
    model: nn.Module, prompt: Sequence[int], answer: Sequence[int], n_samples: int = 128, seed: int = 0
) -> float:
    """`log_likelihoods` of one pair: a float <= 0, in nats."""
    return log_likelihoods(model, [(prompt, answer)], n_samples, seed)[0].item()


@torch.no_grad()
def exact_bound(model: nn.Module, prompt: Sequence[int], answer: Sequence[int], batch_size: int = 256) -> float:
    """The upper bound of -log p(answer | prompt) in nats, every mask enumerated: no sampling error, 2^L - 1 rows.

    sum over the non-empty sets S of masked positions of CE(S) / (|S| * C(L, |S|)); L is limited to 16.
    """
    check_pair(model, prompt, answer)
    length = len(answer)
    if length > 16:
        raise BadInput(f"answer: expected at most 16 tokens to enumerate, got {length}; use log_likelihood")
    device = next(model.parameters()).device
    x0 = torch.tensor([*prompt, *answer], device=device)
    total = 0.0
    for sets in torch.arange(1, 2**length).split(batch_size):
        chosen = (sets[:, None] >> torch.arange(length)) & 1 == 1  # (B,L)
        weight = torch.tensor([1 / (m * math.comb(length, m)) for m in chosen.sum(1).tolist()])
        masked = F.pad(chosen, (len(prompt), 0)).to(device)
        rows = x0.expand(len(sets), -1)
        noised = Noised(rows.masked_fill(masked, model.config.mask_id), masked, weight.to(device))
        total += model_bound(model, rows, noised).double().sum().item()
    return total
