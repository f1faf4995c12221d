"""LLaDA in one file (arXiv:2502.09992). `python -m minillada.plain FILE` trains on a text for a minute, then writes.

Training hides a random share of the tokens behind [MASK], and the model predicts them all from those that are left.
Writing starts from [MASK] alone and fixes some tokens at every step, the surest first. Shapes: B batch, T sequence,
W window, H heads, D width of a head, C width of the model, V vocabulary, N masked tokens.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Generator, Tensor, nn


class Layer(nn.Module):
    """Add to x (B,T,C) what other positions say (attn), then what each position makes of it (ffn, called SwiGLU)."""

    def __init__(self, n_head: int, d_model: int, d_ff: int, rope_theta: float) -> None:
        super().__init__()
        self.n_head, self.frequency = n_head, rope_theta ** -(torch.arange(0, d_model, 2 * n_head) / d_model)  # (D/2,)
        self.attn_norm, self.ffn_norm = nn.RMSNorm(d_model, 1e-5), nn.RMSNorm(d_model, 1e-5)
        self.attn = nn.ModuleDict({name: nn.Linear(d_model, d_model, bias=False) for name in "qkvo"})
        self.ffn = nn.ModuleDict({name: nn.Linear(d_model, d_ff, bias=False) for name in ("gate", "up")})
        self.ffn["down"] = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * self.frequency  # (T,D/2); dims i and i + D/2 turn together
        y, cos, sin = self.attn_norm(x), angles.cos(), angles.sin()
        q, k, v = (self.attn[name](y).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for name in "qkv")  # (B,H,T,D)
        q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        y = nn.functional.scaled_dot_product_attention(q, k, v)  # no causal mask: everyone sees everyone
        x = x + self.attn["o"](y.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        return x + self.ffn["down"](nn.functional.silu(self.ffn["gate"](y)) * self.ffn["up"](y))


class Plain(nn.Sequential):
    """Predict what is behind [MASK]: tokens (B,T) -> logits (B,T,V). The weights have the names of model.LLaDA's."""

    def __init__(self, vocab_size: int, mask_id: int, n_layer=4, n_head=3, d_model=96, d_ff=256, rope_theta=100.0):
        super().__init__()  # nn.Sequential calls the modules one after the other, in the order of these lines
        self.mask_id, self.embed = mask_id, nn.Embedding(vocab_size, d_model)
        self.layers = nn.Sequential(*(Layer(n_head, d_model, d_ff, rope_theta) for _ in range(n_layer)))
        self.norm, self.head = nn.RMSNorm(d_model, 1e-5), nn.Linear(d_model, vocab_size, bias=False)


def mask(x0: Tensor, t: Tensor, mask_id: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Hide each token of x0 (B,T) with its row's probability t (B,): return xt and what is masked, (B,T) both."""
    masked = torch.rand(x0.shape, generator=rng) < t[:, None]  # [.9, .2, .7] < .5 hides one of three: "cat" -> "c_t"
    return x0.masked_fill(masked, mask_id), masked


def bound(model: Plain, x0: Tensor, t: Tensor, rng: Generator) -> Tensor:
    """Estimate an upper bound of -log p(x0), in nats per token: the loss of training (LLaDA, eq. 3)."""
    xt, masked = mask(x0, t, model.mask_id, rng)
    nats = nn.functional.cross_entropy(model(xt)[masked], x0[masked], reduction="none")  # (N,V), (N,) -> (N,)
    return (nats / t[:, None].expand_as(x0)[masked]).sum() / x0.numel()  # by t, because only a share t is predicted


def learn(model: Plain, text: Tensor, batch: tuple[int, int], steps: int, rng: Generator) -> Iterator[float]:
    """Lower the bound with AdamW, at every step on `batch` = (B, T) tokens of the text; yield each step's bound."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.003 * min(1, 20 * (step + 1) / steps, 2 * (1 - step / steps))
        start = torch.randint(len(text) - batch[1] + 1, (batch[0], 1), generator=rng)
        x0, t = text[start + torch.arange(batch[1])], 1 - 0.999 * torch.rand(batch[0], generator=rng)  # t >= 0.001
        loss = bound(model, x0, t, rng)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@torch.no_grad()
def generate(model: Plain, x: Tensor, block_len: int, steps: int, temperature=0.0, rng=None) -> Iterator[Tensor]:
    """Fill the [MASK]s at the end of x (B,T) window by window; yield the tokens after each step (LLaDA, alg. 5)."""
    windows = (x == model.mask_id).any(0).nonzero().flatten().split(block_len)  # columns (W,) each
    for window in windows:
        for left in range(steps // len(windows), 0, -1):
            logits, x = model(x)[:, window], x.clone()  # (B,W,V), (B,T)
            noisy = logits.masked_fill(torch.arange(logits.shape[-1]) == model.mask_id, -torch.inf)  # [MASK] is banned
            if temperature:  # Gumbel noise makes the largest a draw from softmax(logits / temperature)
                noisy = noisy - temperature * torch.zeros_like(noisy).double().exponential_(generator=rng).log()
            tokens, hole = noisy.argmax(-1), x[:, window] == model.mask_id  # (B,W)
            sure = logits.softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).where(hole, -1)
            rank = sure.argsort(descending=True).argsort()  # of [.9, .2, .7]: [0, 2, 1]
            x[:, window] = tokens.where(rank < hole.sum(1, keepdim=True) / left, x[:, window])  # holes / steps left
            yield x


def main(length: int = 64) -> None:
    """Train on nine tenths of a text, print the bound of the last one on the way, and write three passages."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=main.__doc__)
    parser.add_argument("file")
    parser.add_argument("--steps", type=int, default=1200, help="of training (default: 1200)")
    args = parser.parse_args()
    try:
        text = Path(args.file).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as fault:
        parser.exit(2, f"error: {args.file!r}: expected a UTF-8 text, got {fault.args[-1]!r}; name another file\n")
    if len(text) < 10 * length or args.steps < 1:
        got = f"{len(text)} and {args.steps}; name a longer text or more steps"
        parser.exit(2, f"error: training: expected {10 * length} characters and 1 step, got {got}\n")
    letters, ids = torch.tensor([ord(c if c.isprintable() else "\n") for c in text]).unique(return_inverse=True)
    seen, unseen = ids.tensor_split([len(ids) * 9 // 10])
    x0 = unseen[torch.linspace(0, len(unseen) - length, 128).long()[:, None] + torch.arange(length)]  # (B,T)
    rng, model = torch.manual_seed(0), Plain(len(letters) + 1, mask_id=len(letters))
    for step, _ in enumerate(learn(model, seen, (16, length), args.steps, rng), 1):
        if step % 100 == 0 or step == args.steps:
            nats = bound(model, x0, (torch.arange(128) + 0.5) / 128, Generator().manual_seed(0))
            print(f"step {step}: at most {nats:.3f} nats per unseen character", flush=True)
    *_, x = generate(model, torch.full((3, length), model.mask_id), length // 4, length, 0.7, rng)
    print(*("".join(map(chr, letters[row])) for row in x), sep="\n-----\n")


if __name__ == "__main__":
    main()
