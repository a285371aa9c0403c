"""The devices of a run: its mesh, and whether frozen weights are whole on each of them or split."""

from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh

from jaxtune.run.experiment import Experiment
from jaxtune.train import cost
from jaxtune.train.cost import GIB, held_bytes
from jaxtune.train.parallel import (
    DATA,
    FSDP,
    MODEL,
    check_model,
    check_rows,
    make_mesh,
    mesh_shape,
    row_parts,
)
from jaxtune.train.recipe import Start
from jaxtune.train.runtime import free_bytes


def open_mesh(experiment: Experiment) -> tuple[Mesh, str | None]:
    """Return the mesh of a run, and a line on it where there are several devices. Nothing is loaded or compiled.

    Raises:
        UserError: the mesh does not divide the devices, the rows or the model.
    """
    sizes, note = placement(experiment, jax.device_count(), free_bytes, jax.default_backend())
    mesh = make_mesh(**sizes)
    check_rows(experiment.recipe.batch.rows, mesh.shape)
    return mesh, note


def placement(
    experiment: Experiment, devices: int, memory: Callable[[], int], backend: str
) -> tuple[dict[str, int], str | None]:
    """Return the size of each axis of a run's mesh, and a line on what lies where; None for one device.

    Frozen weights that fit each device stay whole there: then only gradients of what is trained travel. What `fsdp`
    would have split them over splits rows alone.

    Args:
        experiment: the run.
        devices: how many.
        memory: () -> bytes of one.
        backend: "cpu" or "gpu".

    Raises:
        UserError: the mesh does not divide the devices or the model.
    """
    m, recipe = experiment.mesh, experiment.recipe
    sizes = mesh_shape(devices, m.data, m.fsdp, m.model)
    if sizes[MODEL] > 1:
        check_model(recipe.module.spec, sizes[MODEL])
    if devices == 1:
        return sizes, None
    known, reason = recipe.abstract, ""
    if sizes[FSDP] > 1 and held_bytes(known.state.trainable, sizes) == held_bytes(known.state.trainable, {}):
        whole = sizes | {DATA: sizes[DATA] * sizes[FSDP], FSDP: 1}
        fit = m.frozen == "whole" or (
            m.frozen == "auto" and cost.fits(step_bytes(experiment, whole, backend), memory())
        )
        sizes, reason = (whole, ", where they fit") if fit else (sizes, "")
    return sizes, _line(known, sizes, reason)


def step_bytes(experiment: Experiment, sizes: Mapping[str, int], backend: str) -> int:
    """Bytes that a step takes on one device of a mesh, by formula; of one row, where memory decides on the rows."""
    recipe, known = experiment.recipe, experiment.recipe.abstract
    rows = 1 if experiment.train.micro_batch == "auto" else max(1, recipe.batch.rows // row_parts(sizes))
    return cost.on_mesh(cost.measure(recipe, backend, known), known, sizes).bytes(rows).total


def _line(known: Start, sizes: Mapping[str, int], reason: str) -> str:
    """What lies where."""

    def said(*trees):
        whole, held = held_bytes(trees, {}), held_bytes(trees, sizes)
        if held == whole:
            return f"whole on each ({whole / GIB:.2f} GiB)"
        return f"split ({held / GIB:.2f} of {whole / GIB:.2f} GiB on each)"

    shape = " x ".join(f"{name} {n}" for name, n in sizes.items())
    trained = said(known.state.trainable, known.state.opt_state)
    return f"Devices: {shape}. Frozen weights are {said(known.frozen)}{reason}; trained ones and moments {trained}."
