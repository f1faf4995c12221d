"""The whole Transformer of the LLaDA family in one file: dense or mixture of experts, tiny or 8B, the same class.

It is a LLaMA-style decoder with one thing taken away: the causal mask. Every position sees every other one, and the
model predicts, for all positions at once, the clean token behind each [MASK]. It is not told the noise level `t`:
the number of masks in its input says that already (RADD, arXiv:2406.03736; LLaDA, arXiv:2502.09992, eq. 11).

Shapes: B batch, T sequence, S keys, H heads, D head width, C model width, F feed-forward width, V vocabulary,
E experts.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import TINY, BadInput, check_number, check_one_of, check_whole


@dataclass(frozen=True)
class ModelConfig:
    """Everything that defines a model. The defaults are LLaDA's; a field left at None is derived from the others."""

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
        derived = {
            "n_kv_head": self.n_head,
            "d_head": self.d_model // max(self.n_head, 1),
            "embedding_size": self.vocab_size,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.rotary_dim is None:
            object.__setattr__(self, "rotary_dim", self.d_head)
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        check_config(self)

    def to_dict(self) -> dict:
        """The fields as JSON can hold them; `ModelConfig(**d)` is the way back."""
        return {**asdict(self), "dense_layers": list(self.dense_layers)}


# The largest value each size may have: far above any published model, far below what would hang a machine.
LIMITS = {"vocab_size": 2**24, "embedding_size": 2**24, "n_layer": 1024, "n_head": 1024, "n_kv_head": 1024}
LIMITS |= {"d_model": 2**17, "d_head": 2**13, "d_ff": 2**20, "max_len": 2**24, "rotary_dim": 2**13}
MOE_LIMITS = {"n_expert": 2**13, "d_expert": 2**20, "n_expert_group": 2**13}


def check_config(c: ModelConfig) -> None:
    """Raise BadInput for a configuration that describes no model."""
    for name, limit in (LIMITS | (MOE_LIMITS if c.n_expert else {})).items():
        check_whole(name, getattr(c, name), 1, limit)
    for name in ("rope_theta", "norm_eps", "router_scale"):
        check_number(name, getattr(c, name), TINY)
    check_one_of("router", c.router, ("softmax", "sigmoid"))
    rules = [
        ("pad_id", c.pad_id != c.mask_id, f"an id other than mask_id {c.mask_id}"),
        ("n_kv_head", c.n_head % c.n_kv_head == 0, f"a divisor of n_head {c.n_head}"),
        ("rotary_dim", c.rotary_dim % 2 == 0 and c.rotary_dim <= c.d_head, f"an even number up to {c.d_head}"),
        ("embedding_size", c.embedding_size >= c.vocab_size, f"at least vocab_size {c.vocab_size}"),
    ]
    if c.n_expert:
        check_whole("n_expert_active", c.n_expert_active, 1, c.n_expert)
        check_whole("n_expert_group_active", c.n_expert_group_active, 1, c.n_expert_group)
        rules += [("n_expert_group", c.n_expert % c.n_expert_group == 0, f"a divisor of n_expert {c.n_expert}")]
        rules += [(name, getattr(c, name) % 8 == 0, "a multiple of 8 with experts") for name in ("d_model", "d_expert")]
    for name, holds, expected in rules:
        if not holds:
            raise BadInput(f"{name}: expected {expected}, got {getattr(c, name)!r}; mend it")
    for name in ("mask_id", "eos_id", "pad_id"):
        if getattr(c, name) is not None or name == "mask_id":
            check_whole(name, getattr(c, name), 0, c.embedding_size - 1)


class KVCache:
    """Keys and values of every layer, after the rotation, each in the slot of its absolute position.

    The first evaluation must be of the whole sequence; a later one over `positions` overwrites just those slots.
    In a bidirectional model what is left in the other slots is out of date: an approximation (exact for one layer).
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B,Hkv,T,D) at positions (T,); return everything held, (B,Hkv,S,D) each."""
        if layer not in self.layers:
            self.layers[layer] = (k.clone(), v.clone())
        held_k, held_v = self.layers[layer]
        held_k[:, :, positions], held_v[:, :, positions] = k, v
        return held_k, held_v


def rotary_angles(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (...,T,dim/2) for positions (...,T): the angles of RoPE (arXiv:2104.09864), no buffers."""
    frequency = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim)
    angles = positions[..., None].to(dtype) * frequency
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first dims of x (B,H,T,D) pairwise, dim i with dim i + half (the half-split layout of the weights)."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)  # times float32 they become float32
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(D)) v: (B,H,T,D), (B,Hkv,S,D) twice -> (B,H,T,D), with PyTorch's fused kernel.

    But training in bfloat16 on a CPU the plain three operations are about four times as fast (PyTorch 2.13).
    """
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16 and attn_mask is None:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, enable_gqa=k.shape[1] < q.shape[1])


class Attention(nn.Module):
    """Multi-head attention that looks both ways; with n_kv_head < n_head several queries share a key and value."""

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

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor,
        attn_mask: Tensor | None,
        cache: KVCache | None,
        asking: Tensor | None = None,
    ) -> Tensor:
        """x (B,T,C) -> what every position, or only the columns `asking` (Q,), sees: (B,Q,H*D), not yet projected."""
        k = rotate(self.k_norm(self.heads(self.k(x))), *rotary)  # (B,Hkv,T,D)
        v = self.heads(self.v(x))
        if cache is not None:
            k, v = cache.update(self.layer, positions, k, v)  # (B,Hkv,S,D)
        if asking is not None:
            x, rotary = x[:, asking], [angle[..., asking, :] for angle in rotary]
            attn_mask = attn_mask[..., asking, :] if attn_mask is not None and attn_mask.shape[-2] > 1 else attn_mask
        q = rotate(self.q_norm(self.heads(self.q(x))), *rotary)  # (B,H,Q,D)
        return attend(q, k, v, attn_mask).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x) (arXiv:2002.05202)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Router(nn.Linear):
    """How well each expert suits each token: x (N,C) -> logits (N,E), in float32 whatever the rest computes in."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # rounding would send tokens to other experts
            return F.linear(x.float(), self.weight.float())


class MoE(nn.Module):
    """K of E small SwiGLUs per token. Experts are stacked, tokens sorted by expert: three matmuls, no loop."""

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
        """The router's logits (N,E) -> the weights and ids of each token's experts, (N,K) each, in float32.

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
        flat = x.reshape(-1, x.shape[-1])  # (N,C)
        weights, experts = self.route(self.router(flat))
        order = experts.flatten().argsort(stable=True)  # the N*K visits, sorted by expert
        token = order // self.c.n_expert_active
        ends = experts.flatten().bincount(minlength=self.c.n_expert).cumsum(0).int()  # where each expert's rows end
        gate, device = self.gate, x.device.type
        # autocast does not know grouped_mm, so the experts see to their precision themselves
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gate.dtype
        visits = flat.to(dtype).index_select(0, token)  # (N*K,C); backward it is faster than flat[token]
        hidden = F.silu(grouped(visits, gate, ends)) * grouped(visits, self.up, ends)
        hidden = hidden * weights.flatten()[order, None].to(dtype)  # before `down`, where rows are F wide and not C
        out = grouped(hidden, self.down, ends).to(flat.dtype)
        y = torch.zeros_like(flat).index_add_(0, token, out).view_as(x)
        return y if self.shared is None else y + self.shared(x)


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows up to ends[e] (and past those before) times weight[e], in x's dtype: (N,in), (E,out,in) -> (N,out)."""
    return F.grouped_mm(x, weight.to(x.dtype).transpose(1, 2), offs=ends)


class Block(nn.Module):
    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.attn = Attention(c, layer)
        self.ffn_norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.ffn = MoE(c) if c.n_expert and layer not in c.dense_layers else MLP(c.d_model, c.d_ff)

    def forward(self, x: Tensor, rotary, positions, attn_mask, cache, keep: Tensor | None = None) -> Tensor:
        if keep is None:
            y = self.attn(self.attn_norm(x), rotary, positions, attn_mask, cache)
        else:  # ask only in the columns that any row wants, and past attention go on with the wanted places alone
            row, column = keep // x.shape[1], keep % x.shape[1]
            asking, index = column.unique(return_inverse=True)
            asking = None if len(asking) == x.shape[1] else asking
            y = self.attn(self.attn_norm(x), rotary, positions, attn_mask, cache, asking)[row, index]
            x = x[row, column]
        x = x + self.attn.o(y)
        return x + self.ffn(self.ffn_norm(x))


class LLaDA(nn.Module):
    """The mask predictor p(x0 | xt): tokens (B,T) -> logits (B,T,V).

    Weights are initialised from PyTorch's global generator (`torch.manual_seed`), or again by `init_weights(rng)`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.embedding_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.head = nn.Linear(c.d_model, c.embedding_size, bias=False)
        if c.tie_head:
            self.head.weight = self.embed.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, rng: torch.Generator | None = None) -> None:
        """Every matrix keeps the size of what passes through it; what adds to the residual stream starts smaller.

        Std 1/sqrt(fan-in), over sqrt(2 layers) for the projections that write to the stream, and a small head: the
        first predictions are nearly uniform, so the first bound is close to ln V nats per token.
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
        self,
        tokens: Tensor,
        attn_mask: Tensor | None = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits for every position of tokens (B,T) long, or for the wanted ones alone.

        attn_mask: bool, broadcastable to (B,1,T,S), True = may look; None = everyone looks at everyone.
        positions: long (T,) or (B,T), absolute; 0..T-1 unless given. Attention depends on their differences only.
        keep: flat indices (N,) into B*T; returns (N,V), and the last layer skips the rest after attention.
        cache: keys and values of an earlier evaluation; `positions` (T,) then say which slots these tokens renew.
        """
        c = self.config
        x = self.embed(tokens)  # (B,T,C)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        full = torch.promote_types(x.dtype, torch.float32)  # angles in float32 even for a bfloat16 model
        cos, sin = rotary_angles(positions, c.rotary_dim, c.rope_theta, full)
        rotary = (cos.unsqueeze(-3), sin.unsqueeze(-3))  # (...,1,T,R/2): the same for every head
        for block in self.blocks[:-1]:
            x = block(x, rotary, positions, attn_mask, cache)
        x = self.blocks[-1](x, rotary, positions, attn_mask, cache, keep)
        return self.head(self.norm(x))

    def n_parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def n_active_parameters(self) -> int:
        """Parameters that one token's forward pass multiplies with: without the input embedding (a look-up) and the
        experts not chosen, with the head."""
        c = self.config
        idle = (c.n_expert - c.n_expert_active) * 3 * c.d_expert * c.d_model
        moe_layers = sum(isinstance(b.ffn, MoE) for b in self.blocks)
        embedding = 0 if c.tie_head else self.embed.weight.numel()
        return self.n_parameters() - embedding - moe_layers * idle

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of one token's forward pass in a sequence of this length; training takes three."""
        c = self.config
        attention = 4 * c.n_layer * length * c.n_head * c.d_head  # queries with keys, weights with values
        return 2 * self.n_active_parameters() + attention
