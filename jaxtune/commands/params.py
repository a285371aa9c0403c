"""`jaxtune params`: which parameters a config would train, and where they lie. Nothing is loaded but config.json."""

from typing import Any

from jaxtune.errors import UserError
from jaxtune.flags import Flag, parse

USAGE = """usage: jaxtune params --config=FILE.py [--config.section.key=value ...] [--mesh] [--devices=N]

Show which parameters a config trains, in total and by module; with --mesh, which axis of which array is split over
which axis of the mesh of devices. Reads the model's config.json only."""

FLAGS = {
    "mesh": Flag("show where each array lies", bool, False),
    "devices": Flag("with --mesh: how many devices; default: those that the mesh names, or this machine's", int),
}


def main(argv: list[str]) -> None:
    cfg, options = parse(argv, FLAGS, usage=USAGE, required=("model.path",))
    if options.devices is not None and (options.devices < 1 or not options.mesh):
        raise UserError(f"--devices={options.devices}: expected 1 or more, beside --mesh")
    from rich.console import Console
    from rich.table import Table

    from jaxtune.config.recipe import experiment

    run = experiment(cfg, weights=False)
    if options.mesh:
        return _show_mesh(run, options.devices)
    counts = run.recipe.abstract.counts
    table = Table("module", "trainable", "all", "%", title=cfg.model.path)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (trainable, total) in counts.groups.items():
        table.add_row(name, f"{trainable:,}", f"{total:,}", f"{100 * trainable / total:.2f}")
    Console(markup=False).print(table)
    print(counts)


def _show_mesh(run: Any, devices: int | None) -> None:
    """A line for each array: its path, shape, and the axis of the mesh over which each of its axes is split."""
    import math

    import jax

    from jaxtune.run.devices import placement
    from jaxtune.train.parallel import spec_of
    from jaxtune.train.runtime import free_bytes
    from jaxtune.tree import map_fields

    named = [n for n in (run.mesh.data, run.mesh.fsdp, run.mesh.model) if n > 0]
    devices = devices or math.lcm(jax.device_count(), math.prod(named))
    sizes, note = placement(run, devices, free_bytes, jax.default_backend())
    known, lines = run.recipe.abstract, []

    def add(path, x, field):
        spec = spec_of(path, x.shape, field, sizes)
        axes = [f"{n}/{axis}" if axis else str(n) for n, axis in zip(x.shape, [*spec, *[None] * x.ndim], strict=False)]
        lines.append((path, f"{x.dtype}[{', '.join(axes)}]"))

    for tree in (known.state.trainable, known.frozen):
        lines.append(("trained, and so its moments" if tree is known.state.trainable else "frozen", ""))
        map_fields(add, tree)
    width = max(len(path) for path, _ in lines)
    print(*(f"  {path:<{width}}  {where}" if where else f"{path}:" for path, where in lines), sep="\n")
    print(note or "Devices: one, which holds all.")
