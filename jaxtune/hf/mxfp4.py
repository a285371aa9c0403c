"""Experts that a checkpoint stores in MXFP4, as gpt-oss's: two tensors, `*_blocks` and `*_scales`, for one matrix."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxtune.hf import tensors

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_PAIRS = np.stack(
    [_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=-1
)  # of a byte, the low half first


class Entry(NamedTuple):
    """One matrix of each expert, [E, K, N], in two tensors of a file.

    Attributes:
        blocks: uint8[E, N, K / 32, 16], two numbers in a byte.
        scales: uint8[E, N, K / 32], exponents of two, plus 127.
    """

    blocks: tensors.Entry
    scales: tensors.Entry

    @property
    def file(self) -> Any:
        """Of the numbers."""
        return self.blocks.file

    @property
    def dtype(self) -> np.dtype:
        """That of the matrix, which holds all of its numbers exactly."""
        return np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        experts, columns, groups, size = self.blocks.shape
        return experts, groups * 2 * size, columns

    @property
    def nbytes(self) -> int:
        """Of the matrix once it is read."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, out: np.ndarray | None = None) -> np.ndarray:
        """Read the matrix, an expert at a time; with `out`, into that array."""
        out = np.empty(self.shape, self.dtype) if out is None else out
        for expert, (blocks, scales) in enumerate(zip(*map(tensors.read, self), strict=True)):
            numbers = np.ldexp(_PAIRS[blocks], scales.astype(np.int32)[..., None, None] - 127)
            np.copyto(out[expert], numbers.reshape(len(blocks), -1).T, casting="unsafe")
        return out


def paired(entries: Mapping[str, tensors.Entry]) -> dict[str, Any]:
    """The tensors of a checkpoint, with each pair in MXFP4 as one, of the name without "_blocks"."""
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        stem, scales = name.removesuffix("_blocks"), entries.get(name.removesuffix("_blocks") + "_scales")
        if stem != name and scales is not None and len(entry.shape) == 4 and entry.shape[:-1] == scales.shape:
            found[stem] = Entry(entry, scales)
        elif not (name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in entries):
            found[name] = entry
    return found
