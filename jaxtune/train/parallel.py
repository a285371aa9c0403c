"""Devices: one mesh axis, `data`, over which the rows of a batch are split. One device is a mesh of one."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.errors import UserError

DATA = "data"


def make_mesh(devices: int | None = None) -> Mesh:
    """Return a mesh of the first `devices` devices (default: all)."""
    found = jax.devices()
    if devices is not None and devices > len(found):
        raise UserError(f"{devices} devices were asked for; {len(found)} are here.")
    return Mesh(np.array(found[:devices]), (DATA,))


def check_rows(rows: int, mesh: Mesh) -> None:
    """Raise UserError unless a micro-batch of `rows` divides over the devices."""
    if rows % mesh.size:
        raise UserError(
            f"A micro-batch of {rows} rows (train.batch_size / train.grad_accum) does not divide over {mesh.size} "
            f"devices; choose a multiple of {mesh.size}."
        )


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Put a host batch [A, B, ...] on the devices, rows split over `data`."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, DATA)))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
