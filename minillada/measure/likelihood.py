"""Bound the likelihood of many (prompt, answer) pairs, of a long text, or, without sampling, of a short answer.

Every figure but `confidence_scores` is an upper bound of -log p, or an estimate of one.
Shapes: N pairs, B rows of a batch, T sequence, L answer, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..diffusion import Noised, model_bound, sample_t
from ..errors import BadInput, check_number, check_whole, has_id
from ..strategies import Ask, Guided, Whole
from ..text.tokenizer import Tokenizer
from .blocks import attention, bound, noise_blocks

Ids = Sequence[int]
Pair = tuple[Ids, Ids]  # prompt, answer
Pairs = Iterable[Pair]


def check_pair(model: nn.Module, prompt: Ids, answer: Ids) -> None:
    """Raise BadInput for an empty answer, a pair that is too long for the model, or an id that it does not have."""
    c, length = model.config, len(prompt) + len(answer)
    if len(answer) == 0:
        raise BadInput("answer: expected at least one token, got none; give an answer")
    if length > c.max_len:
        raise BadInput(f"prompt + answer: expected at most {c.max_len} tokens, got {length}; cut them")
    for token in (*prompt, *answer):
        if not has_id(c, token) or token == c.mask_id:
            raise BadInput(f"token: expected 0 to {c.vocab_size - 1} and not the mask, got {token}; use its tokenizer")


def towards(given: Tensor, model: nn.Module, cfg_scale: float) -> Callable[..., Tensor]:
    """Return the model, guided towards the given tokens (B,T) unless the scale is 0. Its bound is that model's."""
    if not cfg_scale:
        return model
    guided, rows = Guided(Whole(model), cfg_scale, given), torch.arange(len(given), device=given.device)
    return lambda x, attn_mask, where, positions=None: guided(
        Ask(x, where, slice(0, x.shape[1]), rows, attn_mask, positions)
    )


def padded(pairs: Sequence[Pair], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs as the rows of x0, and which places are given and which are valid, (B,T) each."""
    x0 = pad_sequence([torch.tensor([*prompt, *answer]) for prompt, answer in pairs], True).to(device)
    ends = torch.tensor([(len(prompt), len(prompt) + len(answer)) for prompt, answer in pairs], device=device)  # (B,2)
    given, valid = (torch.arange(x0.shape[1], device=device) < end[:, None] for end in ends.unbind(1))
    return x0, given, valid


def noised_rows(model: nn.Module, pairs: Pairs, n_samples: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield every pair n_samples times as (x0, given, xt, masked, weight), (T,) each; the numbers of masks are
    stratified, and in all blocks of a row alike, so that rows stay strata in order."""
    rng, c = Generator().manual_seed(seed), model.config
    for prompt, answer in pairs:
        check_pair(model, prompt, answer)
        x0 = torch.tensor([[*prompt, *answer]]).expand(n_samples, -1)
        maskable = (torch.arange(x0.shape[1]) >= len(prompt)).expand_as(x0)
        noised = noise_blocks(x0, c.mask_id, sample_t(n_samples, rng)[:, None], rng, c.block, maskable)
        weight = noised.weight if c.block else noised.weight[:, None].expand_as(x0)
        yield from zip(x0, ~maskable, noised.xt, noised.masked, weight, strict=True)


def standard_error(samples: Tensor) -> Tensor:
    """Return the standard errors (N,) of the means of samples (N,n), whose columns are strata in order; NaN if n = 1.
    Such a mean varies only by the variance within the strata, which the squared differences of neighbours show."""
    n = samples.shape[1]
    return (samples.diff(dim=1).square().sum(1) / (2 * n * (n - 1))).sqrt() if n > 1 else samples[:, 0] * torch.nan


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, pairs: Pairs, n_samples: int = 128, seed: int = 0, batch_size: int = 32, cfg_scale: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Estimate the lower bound of log p(answer | prompt) in nats for unequal pairs, by n_samples masks of each answer.

    Returns the estimates and their standard errors, (N,) each. LLaDA, eq. 14 and algorithm 3, whose code rounds the
    numbers of masks so that some come twice and others never; here each comes equally often. Raises BadInput.
    """
    check_whole("n_samples", n_samples, 1)
    check_number("cfg_scale", cfg_scale)
    device = next(model.parameters()).device
    rows, bounds = noised_rows(model, pairs, n_samples, seed), [torch.empty(0)]
    while batch := list(islice(rows, batch_size)):
        x0, given, xt, masked, weight = zip(*batch, strict=True)
        valid = pad_sequence([torch.ones_like(m) for m in masked], True).to(device)
        x0, given, *noised = (pad_sequence(rows, True).to(device) for rows in (x0, given, xt, masked, weight))
        guided, block = towards(given, model, cfg_scale), model.config.block
        bounds.append(bound(guided, x0, Noised(*noised), attention(valid), block).cpu())
    samples = -torch.cat(bounds).double().view(-1, n_samples)  # (N,n_samples): rows come pair by pair
    return samples.mean(1), standard_error(samples)


def log_likelihood(
    model: nn.Module, prompt: Ids, answer: Ids, n_samples: int = 128, seed: int = 0, cfg_scale: float = 0.0
) -> float:
    """Return the estimate of `log_likelihoods` for one pair: a float <= 0, in nats."""
    return log_likelihoods(model, [(prompt, answer)], n_samples, seed, cfg_scale=cfg_scale)[0].item()


@torch.no_grad()
def exact_bound(model: nn.Module, prompt: Ids, answer: Ids, batch_size: int = 256, cfg_scale: float = 0.0) -> float:
    """Compute the upper bound of -log p(answer | prompt) in nats without sampling, from all 2^L - 1 masks (L <= 16):
    the sum of CE(S) / (|S| * C(L, |S|)) over the non-empty sets S of masked positions. Of a block model, the sum of its
    blocks' bounds, L tokens of the answer in each, given the clean blocks before. Raises BadInput."""
    check_pair(model, prompt, answer)
    some, total, block = next(model.parameters()), 0.0, model.config.block
    device, wide = some.device, torch.promote_types(some.dtype, torch.float32)
    x0, given, valid = padded([(prompt, answer)], device)  # (1,T) each
    cuts = range(0, x0.shape[1], block) if block else [0]
    for start, stop in pairwise([*(max(cut, len(prompt)) for cut in cuts), x0.shape[1]]):
        if (length := stop - start) > 16:
            raise BadInput(f"answer: expected at most 16 tokens to enumerate, got {length}; use log_likelihood")
        look = attention(valid[:, :stop], block)
        for sets in torch.arange(1, 2**length).split(batch_size):
            chosen = (sets[:, None] >> torch.arange(length)) & 1 == 1  # (B,L)
            weights = [1 / (m * math.comb(length, m)) for m in chosen.sum(1).tolist()]
            masked = F.pad(chosen, (start, 0)).to(device)
            rows, held = x0[:, :stop].expand(len(sets), -1), given[:, :stop].expand(len(sets), -1)
            weight = torch.tensor(weights, dtype=wide, device=device)
            noised = Noised(rows.masked_fill(masked, model.config.mask_id), masked, weight)
            looks = look if look is None else look.expand(len(sets), -1, -1, -1)
            total += model_bound(towards(held, model, cfg_scale), rows, noised, looks).cpu().double().sum().item()
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
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_character(self) -> float | None:
        return self.nats / math.log(2) / self.characters if self.characters else None

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.bytes if self.bytes else None


def strides(tokens: Ids, window: int, stride: int) -> list[Pair]:
    """Cut a text into (context, part) with `stride` tokens in a part and as much context as the window has room for.
    By the chain rule, the sum of the parts' bounds is a bound for the text.
    8 tokens, window 4, stride 2 -> ([], 01), (01, 23), (23, 45), (45, 67)."""
    starts = range(0, len(tokens), stride)
    return [(tokens[max(0, at + stride - window) : at], tokens[at : at + stride]) for at in starts]


def perplexity(
    model: nn.Module, text: str | Ids, tokenizer: Tokenizer | None = None, window: int | None = None,
    stride: int | None = None, n_samples: int = 8, progress: Callable[[list[Pair]], Pairs] = iter, **options,
) -> Perplexity:  # fmt: skip
    """Bound -log p of a text of any length, part by part (see `strides`); no token is put before or after it.

    window: tokens in one evaluation (default: the model's max_len). stride: those of them that are predicted (default:
    half a window). progress: wraps the parts, like tqdm. options: of `log_likelihoods`. Raises BadInput.
    """
    if isinstance(text, str) and tokenizer is None:
        raise BadInput("text: expected a tokenizer with it, or tokens, got neither; give the model's tokenizer")
    tokens = tokenizer.encode(text) if isinstance(text, str) else list(text)
    if not tokens:
        raise BadInput("text: expected at least one token, got none; give some text")
    check_whole("window", window := model.config.max_len if window is None else window, 1, model.config.max_len)
    check_whole("stride", stride := max(1, window // 2) if stride is None else stride, 1, window)
    values, errors = log_likelihoods(model, progress(strides(tokens, window, stride)), n_samples, **options)
    nats, error = -values.sum().item(), errors.square().sum().sqrt().item()
    sizes = (len(text), len(text.encode())) if isinstance(text, str) else (None, None)
    return Perplexity(nats, error, len(tokens), *sizes, window, stride)


@torch.no_grad()
def confidence_scores(
    model: nn.Module, pairs: Pairs, batch_size: int = 32, cfg_scale: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Score answers by filling their tokens in one at a time: L evaluations and no sampling. Each step fills the hole
    where the model gives the answer's own token the highest log-probability, and adds that to the score.

    Returns the scores (N,), to rank the options of a question by, and greedy (N,) bool: whether low-confidence
    remasking at temperature 0, a token per step in one window, would write the answer. A block model fills block by
    block. The order is chosen with the
    answer in view, so a score is no bound. It is our reading of iLLaDA's "confidence-based scoring" for multiple choice
    (arXiv:2606.25331), whose code is not public.
    """
    c, device, pairs = model.config, next(model.parameters()).device, iter(pairs)
    scores, greedy = [torch.empty(0, dtype=torch.double)], [torch.empty(0, dtype=torch.bool)]
    while batch := list(islice(pairs, batch_size)):
        for pair in batch:
            check_pair(model, *pair)
        x0, given, valid = padded(batch, device)
        hole, denoise = valid & ~given, towards(given, model, cfg_scale)
        total = torch.zeros(len(batch), dtype=torch.double)  # Apple's GPUs have no float64
        sure = torch.ones(len(batch), dtype=torch.bool, device=device)
        while hole.any():
            x, left, now = x0.masked_fill(hole, c.mask_id), hole.any(1), hole
            if c.block:
                number = (torch.arange(hole.shape[1], device=device) // c.block).expand_as(hole)
                now = hole & (number == number.where(hole, number.max() + 1).amin(1, keepdim=True))
            where = now.nonzero(as_tuple=True)
            log_p = denoise(x, attn_mask=attention(valid, c.block), where=where).float().log_softmax(-1)  # (n,V)
            own, best = torch.full((2, *hole.shape), -torch.inf, device=device)  # (B,T) each
            own[where] = log_p.gather(-1, x0[now][:, None]).squeeze(-1)
            log_p[:, c.mask_id], log_p[:, c.vocab_size :] = -torch.inf, -torch.inf  # never written
            best[where] = log_p.amax(-1)
            surest, column = own.max(1)
            total += surest.where(left, 0).cpu().double()
            sure &= ~left | (surest == best.amax(1))
            hole.scatter_(1, column[:, None], False)  # in a row without holes, column is 0 and nothing changes
        scores.append(total)
        greedy.append(sure.cpu())
    return torch.cat(scores), torch.cat(greedy)
