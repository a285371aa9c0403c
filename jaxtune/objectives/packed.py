"""Rows of several texts, as a batch of `data.lines` has them."""

from collections.abc import Mapping
from typing import Any

from jaxtune.data.lines import most_segments
from jaxtune.models.classifier import Places


def places(batch: Mapping[str, Any]) -> Places | None:
    """Where the texts of a packed micro-batch lie; None: each has a row of its own."""
    if "place" not in batch:
        return None
    at = batch["place"].reshape(-1)
    return Places(at, most_segments(at.size, len(batch["segments"])))
