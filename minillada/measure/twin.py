"""Train and use the same Transformer as an autoregressive model (causal mask, next-token loss), for comparison.

[MASK] begins every sequence, so all T tokens of a row are predicted, as in the bound of diffusion.py. That is an upper
bound, while the nats here are exact. Training differs in the loss alone: `twin_loss(model, x0).backward()`.

Shapes: B batch, T sequence, N pairs, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..diffusion import Noised, model_bound
from ..errors import BadInput
from ..model import KVCache, block_causal
from ..strategies import draw
from .likelihood import Ids, Pair, check_pair, padded


def causal(length: int, device: torch.device | str | None = None) -> Tensor:
    """Return (T,T) bool: each position may look at itself and at those before it."""
    return block_causal(torch.arange(length, device=device))


def twin_nll(model: nn.Module, x0: Tensor) -> Tensor:
    """Return -log p(x0_i | x0_<i) in nats for every token of x0 (B,T)."""
    before = F.pad(x0[:, :-1], (1, 0), value=model.config.mask_id)
    logits = model(before, attn_mask=causal(x0.shape[1], x0.device))
    return F.cross_entropy(logits.float().transpose(1, 2), x0, reduction="none")


def shifted(x0: Tensor, mask_id: int, maskable: Tensor | None = None) -> Noised:
    """Ask for every token of x0 (B,T), or the maskable ones, in the place of the token before it; each counts once."""
    asked = torch.ones_like(x0, dtype=torch.bool) if maskable is None else maskable
    before = F.pad(x0[:, :-1], (1, 0), value=mask_id)
    return Noised(before, asked, torch.ones(len(x0), device=x0.device))


def shifted_loss(model: nn.Module, x0: Tensor, noised: Noised) -> Tensor:
    """Return the loss in nats per token of what `shifted` asks: what `pretraining_loss` is to diffusion."""
    return model_bound(model, x0, noised, causal(x0.shape[1], x0.device)).mean() / x0.shape[1]


def twin_loss(model: nn.Module, x0: Tensor) -> Tensor:
    """Return the training loss in nats per token, a scalar."""
    return twin_nll(model, x0).mean()


@torch.no_grad()
def twin_log_likelihoods(model: nn.Module, pairs: Sequence[Pair], batch_size: int = 32) -> Tensor:
    """Return the exact log p(answer | prompt) in nats of unequal (prompt, answer) pairs, (N,)."""
    device, values = next(model.parameters()).device, [torch.empty(0, dtype=torch.double)]
    for pair in pairs:
        check_pair(model, *pair)
    for first in range(0, len(pairs), batch_size):
        x0, given, valid = padded(pairs[first : first + batch_size], device)
        nats = twin_nll(model, x0).cpu().double()  # padding stands behind a row, where no token looks
        values.append(-(nats * (valid & ~given).cpu()).sum(1))
    return torch.cat(values)


@torch.no_grad()
def twin_generate(
    model: nn.Module, prompts: Sequence[Ids], gen_len: int, temperature: float = 0.0, seed: int = 0, stop_ids: Ids = ()
) -> list[list[int]]:
    """Generate gen_len tokens after each of several unequal prompts; cut each answer before its first stop id. Caching
    keys and values is exact here, because what stands before a token never changes."""
    c, device = model.config, next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    if not prompts or longest + gen_len > c.max_len:
        raise BadInput(f"prompts: expected room for {gen_len} tokens in {c.max_len}, got {longest}; shorten them")
    x = torch.full((len(prompts), longest + gen_len), c.mask_id, device=device)  # x[:, i] is read to write x[:, i + 1]
    for row, prompt in zip(x, prompts, strict=True):
        row[longest + 1 - len(prompt) : longest + 1] = torch.tensor(prompt, dtype=torch.long)
    start = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    columns = torch.arange(x.shape[1], device=device)
    valid = columns >= start[:, None]  # (B,T): padding stands on the left; it sees itself, else its row would be NaN
    attn_mask = causal(x.shape[1], device) & (valid[:, None] | torch.eye(x.shape[1], dtype=torch.bool, device=device))
    rng = Generator(device if device.type == "cuda" else "cpu").manual_seed(seed)
    banned = torch.tensor([c.mask_id, *range(c.vocab_size, c.embedding_size)], device=device)
    cache, now, answers = KVCache(), columns, []
    for at in range(longest, longest + gen_len):
        logits = model(x[:, now], attn_mask[:, None, now], now, cache=cache)[:, at - now[0]]  # (B,V)
        answers.append(draw(logits.float().index_fill(-1, banned, -torch.inf), temperature, 0, 1.0, rng).to(device))
        now = columns[at + 1 : at + 2]
        x[:, now] = answers[-1][:, None]
    rows = torch.stack(answers, 1).tolist()
    ends = [next((i for i, token in enumerate(row) if token in stop_ids), gen_len) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]
