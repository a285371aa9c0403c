"""Objectives: `module -> loss_fn`, where `loss_fn(params, batch, key) -> ((sum f32[], weight f32[]), aux)`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


def inputs(batch: Mapping[str, Any]) -> Any:
    """The module's input: tokens i32[B, T], or in their place features [B, T, D] or [B, D] (`train.features`)."""
    return batch["features"] if "features" in batch else batch["tokens"]


class OverBatch(NamedTuple):
    """A loss that depends on the whole batch of a step, not on each row alone.

    Attributes:
        sums: (params, batch, key) -> a tree of sums over rows; they are added over micro-batches and devices before the
            loss is computed, and no gradient goes through them.
        loss: (params, batch, key, those sums) -> ((sum, weight), aux).
    """

    sums: Callable[..., Any]
    loss: Callable[..., Any]
