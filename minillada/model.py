"""The whole Transformer of the LLaDA family in one file: dense or mixture of experts, tiny or 8B, the same class.

It is a LLaMA-style decoder without the causal mask. Every position sees every other position, and the model predicts
the clean token behind each [MASK], for all positions at once. It gets no noise level `t` as input: the number of masks
in the input tells it already (RADD, arXiv:2406.03736; LLaDA, arXiv:2502.09992, eq. 11).

Shapes: B batch, T sequence, S keys, H heads, D head width, C width, F feed-forward width, V vocabulary, E experts.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import check_model

# of attention on a GPU; not cuDNN's, which makes a plan for every new shape, and sampling has many shapes
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class ModelConfig:
    """Hold every size and switch of a model. The defaults are LLaDA's; a field left at None follows from the others."""

    vocab_size: int  # ids that mean something, [MASK] included
    mask_id: int
    eos_id: int | None = None
    pad_id: int | None = None
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int | None = None  # fewer than n_head: grouped-query attention
    d_model: int = 192  # C
    d_head: int | None = None  # D; C / H unless given
    d_ff: int = 512  # F
    max_len: int = 4096
    block: int = 0  # tokens of a block of a block-causal model; 0: every position sees every other one
    embedding_size: int | None = None  # V: rows of the embedding and of the head, padded past vocab_size
    rope_theta: float = 500_000.0
    rotary_dim: int | None = None  # fewer than D: only the first dims of a head turn
    norm_eps: float = 1e-5
    tie_head: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head, before the rotation
    # Mixture of experts (n_expert = 0: dense)
    n_expert: int = 0  # E
    n_expert_active: int = 0  # K, experts per token
    d_expert: int = 0  # F of one expert
    d_shared_expert: int = 0  # F of the expert that every token visits
    dense_layers: tuple[int, ...] = ()  # layers that keep a dense feed-forward
    router: str = "softmax"  # softmax | sigmoid; sigmoid has a bias that picks experts but does not weigh them
    router_renormalise: bool = False  # make the K weights of a token sum to one
    router_scale: float = 1.0
    n_expert_group: int = 1  # experts are chosen among the best n_expert_group_active of these groups
    n_expert_group_active: int = 1

    def __post_init__(self) -> None:
        d_head = self.d_head or self.d_model // max(self.n_head, 1)
        derived = {"n_kv_head": self.n_head, "d_head": d_head, "embedding_size": self.vocab_size, "rotary_dim": d_head}
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        check_model(self)


class KVCache:
    """Remember the keys and values of every layer, each in the slot of its absolute position, after the rotation.

    The first evaluation must cover the whole sequence. A later one overwrites the slots of its positions alone, so the
    others are out of date: an approximation, but exact for a model of one layer.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B,Hkv,T,D) at positions (T,) of a layer; return all that it holds, (B,Hkv,S,D) each."""
        if layer not in self.layers:
            self.layers[layer] = (k.clone(), v.clone())
        held_k, held_v = self.layers[layer]
        held_k[:, :, positions], held_v[:, :, positions] = k, v
        return held_k, held_v


class Around(NamedTuple):
    """Hold what every layer of one evaluation gets beside x."""

    rotary: tuple[Tensor, Tensor]  # cosines and sines, (1|B,1,T,rotary_dim/2) each
    positions: Tensor  # (T,) or (B,T) long
    attn_mask: Tensor | None  # bool, broadcastable to (B,1,T,S), True = may look
    cache: KVCache | None


def rotary_angles(positions: Tensor, c: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (...,1,T,rotary_dim/2) for positions (...,T), the same for every head, in float32 or
    wider: the angles of RoPE (arXiv:2104.09864, eq. 15)."""
    wide = torch.promote_types(dtype, torch.float32)
    dims = torch.arange(0, c.rotary_dim, 2, device=positions.device, dtype=wide)
    angles = positions[..., None, :, None].to(wide) * c.rope_theta ** (-dims / c.rotary_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first dims of x (B,H,T,D) in pairs, dim i with dim i + half, as the published weights expect.

    With half = 1 and the angle of 90 degrees: [1, 0] -> [0, 1].
    """
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)  # times float32 they become float32
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def block_causal(number: Tensor) -> Tensor:
    """Return who may look at whom, (S,S) bool, from each place's block (S,): at its own block and at those before it.
    [0, 0, 1] -> [[T, T, F], [T, T, F], [T, T, T]]. With one token in a block this is causal."""
    return number[None, :] <= number[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Return softmax(q k / sqrt(D)) v, (B,H,T,D), for q (B,H,T,D) and k, v (B,Hkv,S,D), with PyTorch's fused kernel.

    Training in bfloat16 on a CPU is the exception: there three plain operations are four times as fast (PyTorch 2.13).
    """
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16 and attn_mask is None:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v  # q is smaller than q k
    with sdpa_kernel(KERNELS) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, enable_gqa=k.shape[1] < q.shape[1])


class Attention(nn.Module):
    """Let every position look at every other one. With n_kv_head < n_head several queries share a key and a value."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.d_head = layer, c.d_head
        self.q = nn.Linear(c.d_model, c.n_head * c.d_head, bias=c.qkv_bias)
        self.k = nn.Linear(c.d_model, c.n_kv_head * c.d_head, bias=c.qkv_bias)
        self.v = nn.Linear(c.d_model, c.n_kv_head * c.d_head, bias=c.qkv_bias)
        self.o = nn.Linear(c.n_head * c.d_head, c.d_model, bias=False)
        self.q_norm = nn.RMSNorm(c.d_head, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.d_head, c.norm_eps) if c.qk_norm else nn.Identity()

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)  # (B,T,H*D) -> (B,H,T,D)

    def queries(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(self.q_norm(self.heads(self.q(x))), *rotary)  # (B,T,C) -> (B,H,T,D)

    def keys(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(self.k_norm(self.heads(self.k(x))), *rotary)  # (B,T,C) -> (B,Hkv,T,D)

    def keys_and_values(self, x: Tensor, around: Around) -> tuple[Tensor, Tensor]:
        """Return the keys and values of x (B,T,C) or, with a cache, of all positions that it holds: (B,Hkv,S,D)."""
        k, v = self.keys(x, around.rotary), self.heads(self.v(x))
        return (k, v) if around.cache is None else around.cache.update(self.layer, around.positions, k, v)

    def forward(self, x: Tensor, around: Around) -> Tensor:
        """Return what every position of x (B,T,C) sees, (B,T,H*D). `Layer` projects it with `o`."""
        k, v = self.keys_and_values(x, around)
        return attend(self.queries(x, around.rotary), k, v, around.attn_mask).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Compute SwiGLU of each position alone: down(silu(gate x) * up x) (arXiv:2002.05202, eq. 6)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Router(nn.Linear):
    """Score how well each expert suits each token: x (N,C) -> logits (N,E), in float32 whatever the rest is in."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # rounding would send tokens to other experts
            return F.linear(x.float(), self.weight.float())


class MoE(nn.Module):
    """Send each token through K of E small SwiGLUs. Experts are stacked, tokens sorted by expert: no loop.

    Of four tokens and three experts with K = 1, experts [2, 0, 2, 1] sort the tokens to [1, 3, 0, 2], and expert 0 gets
    the rows up to 1, expert 1 those up to 2, expert 2 those up to 4.
    """

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.router = Router(c.d_model, c.n_expert, bias=False)
        if c.router == "sigmoid":
            self.register_buffer("router_bias", torch.zeros(c.n_expert))
        self.gate = nn.Parameter(torch.empty(c.n_expert, c.d_expert, c.d_model))  # (E,F,C)
        self.up = nn.Parameter(torch.empty(c.n_expert, c.d_expert, c.d_model))
        self.down = nn.Parameter(torch.empty(c.n_expert, c.d_model, c.d_expert))  # (E,C,F)
        self.shared = MLP(c.d_model, c.d_shared_expert) if c.d_shared_expert else None

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the router's logits (N,E) into the weights and the ids of each token's experts, (N,K) each, in float32.

        LLaDA-MoE takes a softmax over all experts and keeps K of its values as they are. LLaDA2 takes sigmoids, picks
        with a bias and inside the best groups (a group scores the sum of its two best), then makes them sum to one.
        """
        c = self.c
        scores = logits.softmax(-1) if c.router == "softmax" else logits.sigmoid()
        choice = scores + self.router_bias if c.router == "sigmoid" else scores
        if c.n_expert_group > 1:
            groups = choice.unflatten(-1, (c.n_expert_group, -1))  # (N,G,E/G)
            best = groups.topk(min(2, groups.shape[-1])).values.sum(-1).topk(c.n_expert_group_active).indices
            closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, False)
            choice = groups.masked_fill(closed[..., None], -torch.inf).flatten(-2)
        experts = choice.topk(c.n_expert_active).indices
        weights = scores.gather(-1, experts)
        if c.router_renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * c.router_scale, experts

    def forward(self, x: Tensor) -> Tensor:
        flat, k = x.reshape(-1, x.shape[-1]), self.c.n_expert_active  # (N,C)
        weights, experts = self.route(self.router(flat))
        chosen, order = experts.flatten().sort(stable=True)  # the N*K visits, sorted by expert
        each = torch.arange(self.c.n_expert, device=x.device)  # bincount would wait for a GPU
        ends = torch.searchsorted(chosen, each, right=True, out_int32=True)  # where each expert's rows end
        gate, device = self.gate, x.device.type
        # autocast does not know grouped_mm, so the experts see to their precision themselves
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gate.dtype
        visits = flat.to(dtype).repeat_interleave(k, 0).index_select(0, order)  # (N*K,C)
        hidden = F.silu(grouped(visits, gate, ends)) * grouped(visits, self.up, ends)
        hidden = hidden * weights.flatten()[order, None].to(dtype)  # before `down`, where rows are F wide and not C
        out = grouped(hidden, self.down, ends).to(flat.dtype).index_select(0, order.argsort())  # by token again
        y = out.unflatten(0, experts.shape).sum(1).view_as(x)  # always in the same order, unlike index_add on a GPU
        return y if self.shared is None else y + self.shared(x)


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of x (N,in) from ends[e-1] up to ends[e] with weight[e] of (E,out,in); return (N,out)."""
    return F.grouped_mm(x, weight.to(x.dtype).transpose(1, 2), offs=ends)


class Layer(nn.Module):
    """Add to the residual stream what other positions say (attention), then what each makes of it (feed-forward)."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.attn = Attention(c, layer)
        self.ffn_norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.ffn = MoE(c) if c.n_expert and layer not in c.dense_layers else MLP(c.d_model, c.d_ff)

    def forward(self, x: Tensor, around: Around, where: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the stream after this layer: (B,T,C), or (N,C) for the places `where` alone."""
        y = self.attn(self.attn_norm(x), around)  # (B,T,H*D)
        if where is not None:  # past attention no place looks at another one, so the others can be left out
            x, y = x[where], y[where]  # (N,C), (N,H*D)
        x = x + self.attn.o(y)
        return x + self.ffn(self.ffn_norm(x))


class LLaDA(nn.Module):
    """Predict what is behind the masks, p(x0 | xt): tokens (B,T) -> logits (B,T,V) (LLaDA, eq. 3).
    Its weights come from PyTorch's global generator (`torch.manual_seed`); `init_weights(rng)` draws them again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.embedding_size, c.d_model)
        self.layers = nn.ModuleList(Layer(c, layer) for layer in range(c.n_layer))
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.head = nn.Linear(c.d_model, c.embedding_size, bias=False)
        if c.tie_head:
            self.head.weight = self.embed.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, rng: torch.Generator | None = None) -> None:
        """Draw every matrix with std 1/sqrt(fan-in), so that it keeps the size of what passes through it.

        What writes to the residual stream is smaller by sqrt(2 layers), and the head is small, so that the first bound
        is close to ln V nats per token.
        """
        residual = (2 * self.config.n_layer) ** -0.5
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.zeros_(p) if name.endswith("bias") else nn.init.ones_(p)
            elif name == "embed.weight":
                nn.init.normal_(p, std=self.config.d_model**-0.5 if self.config.tie_head else 1.0, generator=rng)
            else:
                scale = residual if name.endswith(("attn.o.weight", "down", "down.weight")) else 1.0
                scale = 0.1 if name == "head.weight" else scale
                nn.init.normal_(p, std=scale * p.shape[-1] ** -0.5, generator=rng)

    def forward(
        self, tokens: Tensor, attn_mask: Tensor | None = None, positions: Tensor | None = None,
        where: tuple[Tensor, Tensor] | None = None, cache: KVCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the logits of every position of tokens (B,T) long: (B,T,V), or (N,V) for the places `where` alone.

        attn_mask: bool, broadcastable to (B,1,T,S), True = may look; None = everyone looks at everyone.
        positions: long (T,) or (B,T), absolute; 0..T-1 unless given. Attention depends on their differences only.
        where: rows (N,) and columns (N,), as in `tokens[where]`; the last layer then skips the other places.
        cache: keys and values of an earlier evaluation; `positions` (T,) then say which slots these tokens renew.
        """
        x = self.embed(tokens)  # (B,T,C)
        positions = torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions
        around = Around(rotary_angles(positions, self.config, x.dtype), positions, attn_mask, cache)
        for layer in self.layers[:-1]:
            x = layer(x, around)
        x = self.layers[-1](x, around, where)
        return self.head(self.norm(x))

    def n_parameters(self) -> int:
        """Count all parameters, a tied head once."""
        return sum(p.numel() for p in self.parameters())
