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


class OverVectors(NamedTuple):
    """A loss that compares the texts of a batch with one another, through a vector of each.

    Micro-batches and devices see all vectors of the step's batch, and its gradients are exact: vectors are computed
    without their activations first, the loss gives the gradient of each, and then every micro-batch is computed again
    and takes the gradients of its own back to the parameters (GradCache: Gao et al. 2021, arXiv:2101.06983, section
    3.2). With one micro-batch nothing is computed twice.

    Attributes:
        vectors: (params, batch, key) -> vectors f32[B, ...] of the rows of a micro-batch.
        loss: (params, vectors [N, ...], batch [N, ...] without its tokens) -> ((sum, weight), aux), of all rows.
    """

    vectors: Callable[..., Any]
    loss: Callable[..., Any]

    def alone(self, params: Any, batch: Mapping[str, Any], key: Any) -> Any:
        """The loss of one micro-batch [B, ...] that is the whole batch."""
        return self.loss(params, self.vectors(params, batch, key), self.about(batch))

    @staticmethod
    def about(batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the loss reads of a batch: everything but the texts themselves."""
        return {name: value for name, value in batch.items() if name not in TEXTS}


TEXTS = ("tokens", "features", "positions", "segments", "types", "place")
