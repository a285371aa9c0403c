"""Log-probabilities of answers under the reference, the model as the run begins: computed once, kept in files.

      texts (prompt and answer) -> model, no dropout -> sum of log-probabilities of the answer     f32 a text
                                                    |
                                        features.bin, by row, found by content

They lie where features lie, in the same kind of files (`jaxtune.train.features.Store`), and a computation that was
stopped goes on. The key holds every weight, token and mask, so another base has other ones. Afterwards no second model
is in memory.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.data import Rows
from jaxtune.models.decoder import head_leaf, head_logits
from jaxtune.objectives.token_nats import token_nats
from jaxtune.train.features import OncePerRow, Store, both, rows_digest
from jaxtune.train.parallel import row_axes

VERSION = 1  # raise it when the same input would give other numbers


class Reference(OncePerRow):
    """Computes the log-probabilities of the answers of data sets, or finds them.

    Args:
        module: a decoder.
        params: of the reference.
        store: where they are kept.
        mesh: whose devices share the rows.
    """

    name = what = "reference"

    def __init__(self, module: Any, params: Any, store: Store, mesh: Mesh):
        super().__init__(params, 1, np.float32, False, store, mesh)
        self.module = module
        self._model_key  # noqa: B018 - made now: a step may take the arrays

    @property
    def facts(self) -> list[Any]:
        spec = repr(replace(self.module.spec, config=""))
        return ["logprobs", VERSION, spec, str(self.module.dtype), self.module.attention]

    def key(self, sources: Sequence[Rows]) -> str:
        masks = hashlib.sha256()
        for rows in both(sources):
            for i in range(len(rows)):
                masks.update(np.packbits(np.asarray(rows[i][1]) > 0))
        found = [*self._model_key, rows_digest(both(sources)), masks.hexdigest()]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:40]

    def sums(
        self,
        sources: Sequence[Rows],
        stop: Callable[[], bool] = lambda: False,
        say: Callable[[int, int], None] = lambda done, total: None,
        tell: Callable[[str], None] = print,
    ) -> np.ndarray:
        """Return the sums of the answers of all sources' rows, f32[texts a row, R]; see `OncePerRow.open`."""
        found = self.open(sources, stop, say, tell)
        values = np.asarray(found.flat[found.layout.first, 0])
        return values.reshape(len(sources[0].sides), -1)

    def _pass(self, rows: Rows, chosen: np.ndarray, n: int, t: int) -> jax.Array:
        tokens, targets, positions = (np.zeros((n, t), np.int32) for _ in range(3))
        where = np.zeros((n, t), bool)
        for b, i in enumerate(chosen):
            ids, mask = rows[i]
            end = len(ids)
            tokens[b, :end], positions[b, :end] = ids, np.arange(end)
            targets[b, : end - 1], where[b, : end - 1] = ids[1:], mask[1:] > 0
        put = NamedSharding(self.mesh, PartitionSpec(row_axes(self.mesh)))
        return self._run(
            self.params, *(jax.device_put(x, put) for x in (tokens, np.where(where, targets, 0), positions, where))
        )

    @cached_property
    def _run(self) -> Callable[..., jax.Array]:
        module, project = self.module, partial(head_logits, spec=self.module.spec)

        def local(params, tokens, targets, positions, where):
            x = module.apply({"params": params}, tokens, positions, None, method="hidden")
            nats = token_nats(project, head_leaf(params), x, targets, where)
            return -jnp.where(where, nats, 0.0).sum(-1, keepdims=True)

        whole, split = PartitionSpec(), PartitionSpec(row_axes(self.mesh))
        specs = (whole, split, split, split, split)
        return jax.jit(jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=split, check_vma=False))
