"""The layout of an expert's record, which holds the tensors that the store keeps for each expert.

TieredMoE computes the experts that have this layout, and ExpertAdam trains them.

This module needs no torch, so that planning tools and storage hosts can use it.
"""

from __future__ import annotations

from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.initializers import Initializer
from ooc_moe_wire.layout import Layout, TensorSpec

BFLOAT16_MULTIPLE = 8
"""In bfloat16 each row of an expert's matrices must be a multiple of 16 bytes long, which is 8 numbers: grouped products need that."""


def check_bfloat16_widths(dim: int, hidden: int) -> None:
    """Raises InvalidRequest if experts of these widths cannot be computed in bfloat16."""
    for name, width in (("dim", dim), ("hidden", hidden)):
        if width % BFLOAT16_MULTIPLE:
            raise InvalidRequest(f"{name}: {width} is not a multiple of {BFLOAT16_MULTIPLE}, which experts in bfloat16 need")


def ffn_layout(dim: int, hidden: int) -> Layout:
    """Describes the record of one expert: the parameters of `gelu(x @ w1 + b1) @ w2 + b2`, Adam's moments and the step count.

    All tensors are float32, except the step count. Initial parameters are uniform within 1/sqrt(fan-in), as those of `torch.nn.Linear`.

    Args:
        dim: width of a token.
        hidden: width inside the expert.
    """
    shapes = {"w1": (dim, hidden), "b1": (hidden,), "w2": (hidden, dim), "b2": (dim,)}
    fan_in = {"w1": dim, "b1": dim, "w2": hidden, "b2": hidden}
    parameters = tuple(
        TensorSpec(name=name, shape=shape, initializer=Initializer("uniform_v1", fan_in[name] ** -0.5)) for name, shape in shapes.items()
    )
    moments = tuple(
        TensorSpec(name=f"{name}.{moment}", shape=shape) for name, shape in shapes.items() for moment in ("exp_avg", "exp_avg_sq")
    )
    return Layout(parameters=parameters, optimizer=(*moments, TensorSpec(name="step", shape=(1,), dtype="int64")))
