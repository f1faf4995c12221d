"""What an evaluation of the model costs, counted and not measured."""

from ..model import LLaDA


def flops_per_token(model: LLaDA, length: int) -> int:
    """Count the floating-point operations of one token's forward pass in a sequence of this length; training takes
    three times as many."""
    c = model.config
    attention = 4 * c.n_layer * length * c.n_head * c.d_head  # queries with keys, weights with values
    return 2 * model.n_active_parameters() + attention
