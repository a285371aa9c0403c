"""Devices: a mesh `data x fsdp x model`, and which axis of which leaf lies over which axis of it.

    data    rows are split, leaves are whole; their gradients are summed
    fsdp    rows are split, and so are matrices, which a device gathers a layer at a time (Rajbhandari et al. 2020,
            arXiv:1910.02054, stage 3); gradients come back as the parts that a device holds
    model   heads, the feed-forward part's width, experts and the vocabulary are split, rows are not (Shoeybi et al.
            2019, arXiv:1909.08053); XLA's partitioner does this

An axis of size 1 is left out of the mesh, `data` excepted. One device is a mesh of one. The step is the same on all:
`train.step` sums over the rows' axes, and leaves the rest to `Sharded` and the partitioner.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.errors import UserError
from jaxtune.train.processes import put
from jaxtune.tree import FROZEN, Field, PyTree, combine, map_fields, path_str
from jaxtune.weights.leaf import Sharded, gathered

DATA, FSDP, MODEL = "data", "fsdp", "model"
BODY = re.compile(r"(?<![^/])segment_\d+(?=/)")  # in the path of a leaf that has a layer axis

# Where the last axes of a leaf lie, by its path; the first rule that matches. What is no matrix is whole everywhere, as
# are layer axes and ranks: the trained fields of adapters are small, and stay whole.
RULES = tuple(
    (re.compile(rf"(.*/)?{pattern}(/.*)?"), axes)
    for pattern, axes in (
        (r"\w+_experts", (MODEL, FSDP, None)),  # [E, K, N]
        (r"(o_proj|down_proj)/kernel", (MODEL, FSDP)),  # [K, N]; heads or the width come in
        (r"(lm_head|\w+_proj)/kernel", (FSDP, MODEL)),  # they, or the vocabulary, go out
        (r"embed_tokens/embedding", (MODEL, FSDP)),  # [V, D]
        (r"kernel", (FSDP, None)),
    )
)


def make_mesh(devices: int | None = None, *, data: int = -1, fsdp: int = 1, model: int = 1) -> Mesh:
    """Return a mesh of the first `devices` devices (default: all).

    Args:
        devices: how many.
        data: devices along the axis `data`; -1: what the others leave.
        fsdp: along `fsdp`, likewise.
        model: along `model`, likewise.

    Raises:
        UserError: the devices are not here, or the axes do not divide them.
    """
    found = jax.devices()
    if devices is not None and devices > len(found):
        raise UserError(f"{devices} devices were asked for; {len(found)} are here.")
    found = found[:devices]
    shape = mesh_shape(len(found), data, fsdp, model)
    kept = {name: n for name, n in shape.items() if n > 1 or name == DATA}
    return Mesh(np.array(found).reshape(*kept.values()), tuple(kept))


def mesh_shape(devices: int, data: int, fsdp: int, model: int) -> dict[str, int]:
    """Return the size of each axis.

    Raises:
        UserError: they do not divide the devices.
    """
    shape = {DATA: data, FSDP: fsdp, MODEL: model}
    said = ", ".join(f"mesh.{name}={n}" for name, n in shape.items())
    open_ = [name for name, n in shape.items() if n == -1]
    if len(open_) > 1:
        raise UserError(f"{said}: only one axis of the mesh may be -1, for what the others leave of the devices.")
    fixed = math.prod(n for n in shape.values() if n != -1)
    if devices % fixed or (not open_ and fixed != devices):
        raise UserError(
            f"{said}: {fixed} {'does not divide' if open_ else 'is not'} the number of devices, which is {devices}."
        )
    return shape | dict.fromkeys(open_, devices // fixed)


def row_axes(mesh: Mesh) -> str | tuple[str, ...]:
    """The axes of the mesh over which rows are split."""
    return (DATA, FSDP) if FSDP in mesh.shape else DATA


def row_parts(sizes: Mapping[str, int]) -> int:
    """The number of parts that rows are split into, by the devices along each axis."""
    return sizes[DATA] * sizes.get(FSDP, 1)


def check_rows(rows: int, sizes: Mapping[str, int]) -> None:
    """Raise UserError unless a micro-batch of `rows` divides over a mesh with these devices along each axis."""
    parts = row_parts(sizes)
    if rows % parts:
        raise UserError(
            f"A micro-batch of {rows} rows (train.batch_size / train.grad_accum) does not divide over {parts} "
            f"devices; choose a multiple of {parts}."
        )


def check_model(spec: Any, parts: int) -> None:
    """Raise UserError unless the `parts` along the axis `model` divide every block's heads, width and experts."""
    for i, segment in enumerate(spec.segments):
        for j, block in enumerate(segment.pattern):
            found = [
                ("self_attn/q_proj", block.heads, "query heads"),
                ("self_attn/k_proj", block.kv_heads, "key-value heads"),
                ("mlp/gate_up_experts", block.experts, "experts"),
                ("mlp/up_proj", 0 if block.experts else block.mlp, "channels of the feed-forward part"),
            ]
            for name, size, what in found:
                if size % parts:
                    raise UserError(
                        f"mesh.model={parts} does not divide the {size} {what} of segment_{i}/block_{j}/{name}; at "
                        f"most {math.gcd(size, parts)} do here. Split weights over mesh.fsdp instead."
                    )


def spec_of(path: str, shape: Sequence[int], field: Field | None, sizes: Mapping[str, int]) -> PartitionSpec:
    """Where an array lies.

    Args:
        path: "a/b/c"; what precedes the parameter's own path does not matter.
        shape: of the array; more layer axes may precede the rule's.
        field: what it is to its leaf; None: a plain array.
        sizes: devices along each axis of the mesh.
    """
    if field is not None and (field.role is not FROZEN or field.ndim < 2):
        return PartitionSpec()
    for pattern, axes in RULES:
        if len(shape) >= len(axes) and pattern.fullmatch(path):
            last = shape[len(shape) - len(axes) :]
            named = [a if sizes.get(a, 1) > 1 and k % sizes[a] == 0 else None for a, k in zip(axes, last, strict=True)]
            return PartitionSpec(*[None] * (len(shape) - len(axes)), *named) if any(named) else PartitionSpec()
    return PartitionSpec()


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Where each array of a tree lies: parameters, moments or a whole state."""

    def one(path, x, field):
        memory = "pinned_host" if path.endswith("/on_host") else None  # `moments.OnHost`
        return NamedSharding(mesh, spec_of(path, x.shape, field, mesh.shape), memory_kind=memory)

    return map_fields(one, tree)


def lying(tree: PyTree, sizes: Mapping[str, int]) -> list[tuple[str, Any, PartitionSpec]]:
    """(path, array, where it lies) for each array of a tree, which may be abstract."""
    found: list[tuple[str, Any, PartitionSpec]] = []
    map_fields(lambda path, x, field: found.append((path, x, spec_of(path, x.shape, field, sizes))), tree)
    return found


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put each array of a tree where it lies."""
    return put(tree, shardings(tree, mesh))


def stay(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Keep the arrays of a tree where they lie; traced."""
    if mesh is None or set(mesh.shape) == {DATA}:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings(tree, mesh))


class Held(NamedTuple):
    """The trees of a step as one device sees them, within `shard_map` over the rows' axes.

    Attributes:
        mesh: None: one device, which sees all.
        axes: of trainable, member and frozen: for each array the axis that is split over `fsdp`, counted from the
            last, which is -1; 0: none.
        beside: likewise over `model`.
        specs: for `shard_map`.
    """

    mesh: Mesh | None = None
    axes: Sequence[PyTree] = ()
    beside: Sequence[PyTree] = ()
    specs: Sequence[PyTree] = ()

    @classmethod
    def of(cls, mesh: Mesh, *trees: PyTree) -> "Held":
        """What a device holds of whole trees."""

        def over(name):
            def axis(path, x, field):
                spec = spec_of(path, x.shape, field, mesh.shape)
                return spec.index(name) - x.ndim if name in spec else 0

            return [map_fields(axis, tree) for tree in trees]

        def spec(x, axis):
            return PartitionSpec(*[None] * (x.ndim + axis), FSDP) if axis else PartitionSpec()

        axes = over(FSDP)
        return cls(mesh, axes, over(MODEL), [jax.tree.map(spec, *pair) for pair in zip(trees, axes, strict=True)])

    @property
    def names(self) -> set[str]:
        """The rows' axes."""
        return {DATA, FSDP} & set(self.mesh.shape)

    def join(self, *trees: PyTree) -> PyTree:
        """`combine`; a layer's parts become `Sharded`, and it gathers them; all others are gathered now."""
        if self.mesh is None or FSDP not in self.mesh.shape:
            return combine(*trees)

        def whole(path, part, axis, beside):
            part = Sharded(part, axis, FSDP, (beside, MODEL) if beside else None) if axis else part
            return part if BODY.search(path_str(path)) else gathered(part)

        return jax.tree_util.tree_map_with_path(whole, combine(*trees), combine(*self.axes), combine(*self.beside))

    def sum(self, tree: PyTree) -> PyTree:
        """The sum over the rows' devices."""
        return tree if self.mesh is None else jax.lax.psum(tree, row_axes(self.mesh))

    def sum_grads(self, grads: PyTree) -> PyTree:
        """The same of gradients by the trainable tree; those of a part are summed over `fsdp` already."""
        if self.mesh is None or FSDP not in self.mesh.shape:
            return self.sum(grads)
        return jax.tree.map(lambda g, axis: jax.lax.psum(g, DATA) if axis else self.sum(g), grads, self.axes[0])


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Put a host batch [A, B, ...] on the devices, rows split."""
    return put(batch, NamedSharding(mesh, PartitionSpec(None, row_axes(mesh))))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a tree on every device of the mesh."""
    return put(tree, NamedSharding(mesh, PartitionSpec()))
