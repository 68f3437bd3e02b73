"""All laws, in the order of their numbers."""

from minitransformer.testing.laws import positions, runs, symmetries, weights
from minitransformer.testing.laws.law import Law

ALL: tuple[Law, ...] = (
    positions.no_future_leak,  # L1
    positions.cache,
    positions.appended_keys,
    positions.padding,
    positions.packing,  # L5
    symmetries.rows,
    symmetries.order,
    symmetries.heads,
    symmetries.groups,
    weights.limits,  # L10
    weights.linear,
    weights.shift,
    weights.convex,
    weights.weights,
    weights.empty_rows,  # L15
    weights.bool_mask,
    positions.rope,
    runs.dropout,
    runs.evaluation,
    runs.threads,  # L20
    weights.split,
)
