"""Objectives: `module -> loss_fn`, where `loss_fn(params, batch, key) -> ((sum f32[], weight f32[]), aux)`."""

from collections.abc import Mapping
from typing import Any


def inputs(batch: Mapping[str, Any]) -> Any:
    """The module's input: tokens i32[B, T], or in their place features [B, T, D] or [B, D] (`train.features`)."""
    return batch["features"] if "features" in batch else batch["tokens"]
