"""Likelihoods made of the bound: estimates for many (prompt, answer) pairs, and the exact bound of a short answer.

Shapes: N pairs, B rows of a batch, T sequence, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .diffusion import Noised, exact_count, model_bound, sample_t
from .errors import BadInput


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
