"""Count what an evaluation of the model costs."""

from ..model import LLaDA, MoE


def n_active_parameters(model: LLaDA) -> int:
    """Count the parameters that multiply a token: its experts and the head, not the embedding, which is looked up."""
    c = model.config
    idle = (c.n_expert - c.n_expert_active) * 3 * c.d_expert * c.d_model
    moe_layers = sum(isinstance(layer.ffn, MoE) for layer in model.layers)
    embedding = 0 if c.tie_head else model.embed.weight.numel()
    return model.n_parameters() - embedding - moe_layers * idle


def flops_per_token(model: LLaDA, length: int) -> int:
    """Count a token's floating-point operations forward, in a sequence of this length; training takes three times."""
    c = model.config
    attention = 4 * c.n_layer * length * c.n_head * c.d_head  # queries with keys, weights with values
    return 2 * n_active_parameters(model) + attention
