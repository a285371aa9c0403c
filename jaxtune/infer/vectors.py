"""Vectors of texts: a model with its pooling, run over texts in batches of similar length."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.data.embeddings import Tokenize
from jaxtune.errors import UserError
from jaxtune.hf.load import load, read_config, resolve
from jaxtune.hf.vectors import Pooled, read_dense, read_pooled
from jaxtune.infer.generation import bucket
from jaxtune.infer.logprobs import batches_by_length, most_tokens
from jaxtune.infer.source import Tuned, find, open_source, same_base, tokenizer_of
from jaxtune.models.decoder import Decoder
from jaxtune.objectives.embedding import vector
from jaxtune.train.processes import on_host

SHORT = 16  # tokens: widths of batches up to 64 are multiples of it


class Embedder(NamedTuple):
    """A model that gives vectors.

    Attributes:
        module, params: an encoder, or a decoder without its head.
        pooled: how its hidden states become a vector.
        tokenizer: of its texts.
    """

    module: Any
    params: Any
    pooled: Pooled
    tokenizer: Any

    @property
    def max_length(self) -> int:
        """The most tokens of a text; longer ones are cut."""
        return min(self.pooled.max_length or self.module.spec.positions, self.module.spec.positions)

    def tokens(self, texts: Sequence[str], prompt: str = "") -> list[list[int]]:
        """The token ids of texts behind a prompt, cut to `max_length`."""
        cut = Tokenize(self.tokenizer, self.max_length)
        return [ids for ids, _ in cut([prompt + text for text in texts])]

    def __call__(self, texts: Sequence[str], prompt: str = "", width: int | None = None) -> np.ndarray:
        """The vectors of texts, f32[N, D]; see `vectors_of`."""
        return self.vectors_of(self.tokens(texts, prompt), width)

    def vectors_of(
        self, tokens: Sequence[Sequence[int]], width: int | None = None, done: Callable[[int], None] = lambda n: None
    ) -> np.ndarray:
        """The vectors of tokenised texts, f32[N, D].

        Args:
            tokens: of each text.
            width: the first so many channels, divided by their length where the model's vectors are; None: all.
            done: called with the number of texts after each batch.
        """
        found = np.zeros((len(tokens), self.pooled.width(self.module)), np.float32)
        for batch, part in self.batches(tokens):
            found[batch] = part
            done(len(batch))
        return found if width is None else truncated(found, width, self.pooled.normalize)

    def batches(self, tokens: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield (indices, their vectors) of batches of texts of similar length, the longest first."""
        run = _run(self.module, self.pooled)
        for batch in batches_by_length([len(ids) for ids in tokens], most_tokens()):
            longest = max(len(tokens[i]) for i in batch)
            wide = -(-longest // SHORT) * SHORT if longest <= 64 else bucket(longest)
            wide, rows = min(wide, self.module.spec.positions), 1 << (len(batch) - 1).bit_length()
            laid, segments = np.zeros((rows, wide), np.int32), np.zeros((rows, wide), np.int32)
            segments[:, 0] = 1
            for row, i in enumerate(batch):
                laid[row, : len(tokens[i])], segments[row, : len(tokens[i])] = tokens[i], 1
            positions = np.broadcast_to(np.arange(wide, dtype=np.int32), laid.shape)
            yield batch, on_host(run(self.params, laid, positions, segments))[: len(batch)]


_RUNS: dict[Any, Any] = {}


def _run(module: Any, pooled: Pooled) -> Any:
    """The compiled function of a module: kept, so that models of one shape share it."""
    key = (module, pooled.pooling, pooled.normalize, pooled.dense)
    if key not in _RUNS:
        _RUNS[key] = jax.jit(partial(vector, module, pooled))
    return _RUNS[key]


def truncated(vectors: np.ndarray, width: int, normalize: bool = True) -> np.ndarray:
    """The first `width` channels of vectors, divided by their lengths if `normalize`."""
    if not 1 <= width <= vectors.shape[-1]:
        raise UserError(f"a width of {width}: the model's vectors have {vectors.shape[-1]} channels.")
    cut = vectors[..., :width]
    return cut / np.maximum(np.linalg.norm(cut, axis=-1, keepdims=True), 1e-12) if normalize else cut


def open_embedder(source: Tuned | str | Path, *, base: bool = False, dtype: Any = None) -> Embedder:
    """Load what gives vectors: a run, an adapter, a directory of sentence-transformers, or any encoder or decoder.

    A directory that does not say how vectors are made pools by mean (a decoder by the last token) and normalises.

    Args:
        source: from `infer.source.find`, or what that takes.
        base: load what was tuned, instead of the result; it pools as the result does.
        dtype: of activations; default: bfloat16 on a GPU, float32 elsewhere.

    Raises:
        UserError: it has a label head.
    """
    if not isinstance(source, Tuned):
        source = find(source)
    if dtype is None:
        dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    if base:
        with same_base(source):
            folder = source.model if source.adapter else resolve(source.base)
            module, params = load(folder, dtype=dtype, quantization=source.quantization)
    else:
        module, params, _ = open_source(source, dtype=dtype)
    if module.label_head:
        raise UserError(f"{source.adapter or source.model} gives labels, not vectors: take a model without a head.")
    if module.continues:
        module, params = headless(module, params)
    pooled = pooled_of(source) or Pooled("mean" if module.is_encoder else "last")
    if base:
        own = read_pooled(folder)
        pooled = dataclasses.replace(pooled, dense=own.dense if own else ())
        return Embedder(module, params | read_dense(folder, pooled), pooled, tokenizer_of(source))
    return Embedder(module, params | dense_of(source), pooled, tokenizer_of(source))


def headless(module: Decoder, params: Any) -> tuple[Any, Any]:
    """A decoder and its parameters without the output head."""
    return module.without_head(), {name: leaf for name, leaf in params.items() if name != "lm_head"}


def pooled_of(source: Tuned) -> Pooled | None:
    """How the vectors of a source are made, as its files say; None: they do not."""
    return next((found for folder in _folders(source) if (found := read_pooled(folder)) is not None), None)


def dense_of(source: Tuned) -> dict[str, Any]:
    """The parameters of a source's dense layers; see `hf.vectors.read_dense`."""
    for folder in _folders(source):
        if (found := read_pooled(folder)) is not None:
            return read_dense(folder, found)
    return {}


def _folders(source: Tuned) -> list[Path]:
    """The directories that may say how a source's vectors are made, the tuned one first."""
    return [folder for folder in (source.adapter, source.model) if folder]


def has_vectors(source: Tuned) -> bool:
    """Whether a source is a directory of vectors."""
    return pooled_of(source) is not None and "model_type" in read_config(source.model)
