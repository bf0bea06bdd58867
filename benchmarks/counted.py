"""Operations that a Llama's forward pass takes, counted from its shape: what floors are made of."""

from benchmarks.sizes import Shape


def layer_operations(shape: Shape, tokens: float, *, up_to: str = "mlp") -> float:
    """Of one token in one layer, in a sample of ``tokens``; ``up_to`` attention or mlp.

    Two for each multiply-add of the projections and of attention's products, whose triangle is
    counted whole: that is what SDPA computes on the CPU.
    """
    inside = shape.query_heads * shape.head_dim
    groups = shape.kv_groups * shape.head_dim
    attention = 2 * shape.hidden * (inside + 2 * groups) + 4 * inside * tokens
    if up_to == "attention":
        return attention
    return attention + 2 * inside * shape.hidden + 6 * shape.hidden * shape.feed_forward


def forward_operations(shape: Shape, tokens: float) -> float:
    """Of one token in the whole model, LM head included."""
    return shape.layers * layer_operations(shape, tokens) + 2 * shape.hidden * shape.vocabulary


def backward_operations(shape: Shape, tokens: float, lowest: int = 0) -> float:
    """Of one token, for its inputs' gradients down to the layer ``lowest``; no weight's gradient.

    A product with a weight takes one more; the two products of attention take four, none of them
    for a weight.
    """
    attention = 4 * shape.query_heads * shape.head_dim * tokens
    of_layer = layer_operations(shape, tokens) + attention
    return (shape.layers - lowest) * of_layer + 2 * shape.hidden * shape.vocabulary


def scoring_operations(shape: Shape, tokens: float, deepest: int) -> float:
    """Of one token up to the heads' outputs in the layer ``deepest``."""
    return deepest * layer_operations(shape, tokens) + layer_operations(
        shape, tokens, up_to="attention"
    )
