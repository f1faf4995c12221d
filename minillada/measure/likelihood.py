"""Bound the likelihood of many (prompt, answer) pairs, of a long text, or, without sampling, of a short answer.

Every figure is an upper bound of -log p, or an estimate of one; only `confidence_scores`, which ranks the options of a
question, is not. Shapes: N pairs, B rows of a batch, T sequence, L answer, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..diffusion import Noised, exact_count, model_bound, sample_t
from ..errors import BadInput, check_number, check_whole
from ..strategies import Ask, Guided, Whole
from ..text.tokenizer import Tokenizer

Pair = tuple[Sequence[int], Sequence[int]]  # prompt, answer


def check_pair(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Raise BadInput for an empty answer, a pair that is too long for the model, or an id that it does not have."""
    c = model.config
    if len(answer) == 0:
        raise BadInput("answer: expected at least one token, got none; give an answer")
    if len(prompt) + len(answer) > c.max_len:
        length = len(prompt) + len(answer)
        raise BadInput(f"prompt + answer: expected at most {c.max_len} tokens, got {length}; cut them")
    for token in (*prompt, *answer):
        if not 0 <= token < c.vocab_size or token == c.mask_id:
            raise BadInput(f"token: expected 0 to {c.vocab_size - 1} and not the mask, got {token}; use its tokenizer")


def towards(given: Tensor, model: nn.Module, cfg_scale: float) -> Callable[..., Tensor]:
    """Return the model, guided towards the given tokens (B,T) unless the scale is 0. Its bound is that model's."""
    if not cfg_scale:
        return model
    guided, rows = Guided(Whole(model), cfg_scale, given), torch.arange(len(given), device=given.device)
    return lambda x, attn_mask, where: guided(Ask(x, where, slice(0, x.shape[1]), rows, attn_mask))


def attention(valid: Tensor) -> Tensor | None:
    """Return the attn_mask (B,1,1,T) that hides what is not valid (B,T), or None if everything is valid."""
    return None if valid.all() else valid[:, None, None, :]


def noised_rows(model: nn.Module, pairs: Iterable[Pair], n_samples: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield every pair n_samples times as (x0, given, xt, masked, weight); the numbers of masks are stratified."""
    rng = Generator().manual_seed(seed)
    for prompt, answer in pairs:
        check_pair(model, prompt, answer)
        x0 = torch.tensor([[*prompt, *answer]]).expand(n_samples, -1)
        maskable = (torch.arange(x0.shape[1]) >= len(prompt)).expand_as(x0)
        noised = exact_count(x0, model.config.mask_id, sample_t(n_samples, rng), rng, maskable)
        yield from zip(x0, ~maskable, *noised, strict=True)


def standard_error(samples: Tensor) -> Tensor:
    """Return the standard errors (N,) of the means of samples (N,n), whose columns are strata in order; NaN if n = 1.

    The mean of stratified samples varies only by the variance within the strata. Neighbouring strata have nearly the
    same mean, so the squared differences of neighbours show it; the variance over all samples would be too large.
    """
    n = samples.shape[1]
    return (samples.diff(dim=1).square().sum(1) / (2 * n * (n - 1))).sqrt() if n > 1 else samples[:, 0] * torch.nan


@torch.no_grad()
def log_likelihoods(
    model: nn.Module,
    pairs: Iterable[Pair],
    n_samples: int = 128,
    seed: int = 0,
    batch_size: int = 32,
    cfg_scale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Estimate the lower bound of log p(answer | prompt) in nats for unequal (prompt, answer) pairs.

    Returns the estimates and their standard errors, (N,) each. n_samples: masks for each pair. The prompt is never
    masked; only guidance also evaluates the model without it. LLaDA, eq. 14 and algorithm 3. The official code rounds
    the numbers of masks so that some come twice and others never; here each comes equally often. Raises BadInput.
    """
    check_whole("n_samples", n_samples, 1)
    check_number("cfg_scale", cfg_scale)
    device = next(model.parameters()).device
    rows, bounds = noised_rows(model, pairs, n_samples, seed), [torch.empty(0)]
    while batch := list(islice(rows, batch_size)):
        x0, given, xt, masked, weight = zip(*batch, strict=True)
        valid = pad_sequence([torch.ones_like(m) for m in masked], True).to(device)
        x0, given, xt, masked = (pad_sequence(rows, True).to(device) for rows in (x0, given, xt, masked))
        noised = Noised(xt, masked, torch.stack(weight).to(device))
        bounds.append(model_bound(towards(given, model, cfg_scale), x0, noised, attention(valid)).cpu())
    samples = -torch.cat(bounds).double().view(-1, n_samples)  # (N,n_samples): rows come pair by pair
    return samples.mean(1), standard_error(samples)


def log_likelihood(
    model: nn.Module,
    prompt: Sequence[int],
    answer: Sequence[int],
    n_samples: int = 128,
    seed: int = 0,
    cfg_scale: float = 0.0,
) -> float:
    """Return the estimate of `log_likelihoods` for one pair: a float <= 0, in nats."""
    return log_likelihoods(model, [(prompt, answer)], n_samples, seed, cfg_scale=cfg_scale)[0].item()


@torch.no_grad()
def exact_bound(
    model: nn.Module, prompt: Sequence[int], answer: Sequence[int], batch_size: int = 256, cfg_scale: float = 0.0
) -> float:
    """Compute the upper bound of -log p(answer | prompt) in nats without sampling, from all 2^L - 1 masks (L <= 16).

    It is the sum of CE(S) / (|S| * C(L, |S|)) over the non-empty sets S of masked positions. Raises BadInput.
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
        given = (torch.arange(len(x0), device=device) < len(prompt)).expand_as(rows)
        total += model_bound(towards(given, model, cfg_scale), rows, noised).double().sum().item()
    return total


class Perplexity(NamedTuple):
    """An upper bound of a text's -log p; every figure derived from it is an upper bound too."""

    nats: float  # of the whole text
    standard_error: float  # of the nats; NaN with one sample for each part
    tokens: int
    characters: int | None  # None for a text given as tokens
    bytes: int | None  # of UTF-8
    window: int  # tokens seen at a time
    stride: int  # how many of them were predicted

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_character(self) -> float | None:
        return self.nats / math.log(2) / self.characters if self.characters else None

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.bytes if self.bytes else None


def strides(tokens: Sequence[int], window: int, stride: int) -> list[Pair]:
    """Cut a text into (context, part) with `stride` tokens in a part and as much context as the window has room for.

    Every token is predicted once. By the chain rule over the parts, the sum of their bounds is a bound for the text.
    8 tokens, window 4, stride 2 -> ([], 01), (01, 23), (23, 45), (45, 67).
    """
    starts = range(0, len(tokens), stride)
    return [(tokens[max(0, at + stride - window) : at], tokens[at : at + stride]) for at in starts]


def perplexity(
    model: nn.Module,
    text: str | Sequence[int],
    tokenizer: Tokenizer | None = None,
    window: int | None = None,
    stride: int | None = None,
    n_samples: int = 8,
    seed: int = 0,
    batch_size: int = 32,
    cfg_scale: float = 0.0,
    progress: Callable[[list[Pair]], Iterable[Pair]] = iter,
) -> Perplexity:
    """Bound -log p of a text of any length, part by part (see `strides`); no token is put before or after it.

    window: tokens in one evaluation (default: the model's max_len). stride: those of them that are predicted (default:
    half a window). progress: wraps the parts, like tqdm. Raises BadInput.
    """
    if isinstance(text, str) and tokenizer is None:
        raise BadInput("text: expected a tokenizer with it, or tokens, got neither; give the model's tokenizer")
    tokens = tokenizer.encode(text) if isinstance(text, str) else list(text)
    if not tokens:
        raise BadInput("text: expected at least one token, got none; give some text")
    check_whole("window", window := model.config.max_len if window is None else window, 1, model.config.max_len)
    check_whole("stride", stride := max(1, window // 2) if stride is None else stride, 1, window)
    parts = progress(strides(tokens, window, stride))
    values, errors = log_likelihoods(model, parts, n_samples, seed, batch_size, cfg_scale)
    nats, error = -values.sum().item(), errors.square().sum().sqrt().item()
    characters, size = (len(text), len(text.encode())) if isinstance(text, str) else (None, None)
    return Perplexity(nats, error, len(tokens), characters, size, window, stride)


@torch.no_grad()
def confidence_scores(
    model: nn.Module, pairs: Iterable[Pair], batch_size: int = 32, cfg_scale: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Score answers by filling their tokens in one at a time: L evaluations and no sampling.

    Each step fills the hole where the model gives the answer's own token the highest log-probability, and adds that to
    the score. Returns the scores (N,), to rank the options of a question by, and greedy (N,) bool: whether
    low-confidence remasking at temperature 0, a token per step in one window, would write the answer.

    A score is the log-likelihood along one order that is chosen with the answer in view. Over all answers these add up
    to more than one, so it is no bound. iLLaDA (arXiv:2606.25331) has a "confidence-based scoring" for multiple choice
    whose code is not public; this is our reading of the name.
    """
    c, device, pairs = model.config, next(model.parameters()).device, iter(pairs)
    scores, greedy = [torch.empty(0, dtype=torch.double)], [torch.empty(0, dtype=torch.bool)]
    while batch := list(islice(pairs, batch_size)):
        for pair in batch:
            check_pair(model, *pair)
        x0, given, valid = (
            pad_sequence([torch.tensor(row) for row in rows], True).to(device)
            for rows in (
                [[*prompt, *answer] for prompt, answer in batch],
                [[True] * len(prompt) + [False] * len(answer) for prompt, answer in batch],
                [[True] * (len(prompt) + len(answer)) for prompt, answer in batch],
            )
        )
        hole = valid & ~given
        total = torch.zeros(len(batch), dtype=torch.double, device=device)
        sure = torch.ones(len(batch), dtype=torch.bool, device=device)
        denoise = towards(given, model, cfg_scale)
        while hole.any():
            where = hole.nonzero(as_tuple=True)
            logits = denoise(x0.masked_fill(hole, c.mask_id), attn_mask=attention(valid), where=where)
            log_p = logits.float().log_softmax(-1)  # (n,V)
            own = torch.full(hole.shape, -torch.inf, device=device).masked_scatter_(
                hole, log_p.gather(-1, x0[hole][:, None])
            )
            log_p[:, c.mask_id], log_p[:, c.vocab_size :] = -torch.inf, -torch.inf  # never written
            best = torch.full_like(own, -torch.inf).masked_scatter_(hole, log_p.amax(-1))
            left = hole.any(1)
            surest, column = own.max(1)
            total += surest.double().where(left, 0)
            sure &= ~left | (surest == best.amax(1))
            hole.scatter_(1, column[:, None], False)  # in a row without holes, column is 0 and nothing changes
        scores.append(total.cpu())
        greedy.append(sure.cpu())
    return torch.cat(scores), torch.cat(greedy)
