"""`jaxtune params`: which parameters a config would train. Nothing is loaded but config.json."""

from jaxtune.cli import parse
from jaxtune.errors import UserError

USAGE = """usage: jaxtune params --config=FILE.py [--config.section.key=value ...]

Show which parameters a config trains, in total and by module. Reads the model's config.json only."""


def main(argv: list[str]) -> None:
    cfg, _ = parse(argv, usage=USAGE, required=("model.path",))
    import jax
    from rich.console import Console
    from rich.table import Table

    from jaxtune import tree
    from jaxtune.run import job

    cfg_model = job.Model(*_abstract_model(cfg))
    found = []

    def build(params):
        found.append(tree.count(*job.tuned(cfg, cfg_model, params)))

    jax.eval_shape(build, cfg_model.abstract())
    [counts] = found
    if not counts.trainable:
        raise UserError("Nothing is left to train.")
    table = Table("module", "trainable", "all", "%", title=cfg.model.path)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (trainable, total) in counts.groups.items():
        table.add_row(name, f"{trainable:,}", f"{total:,}", f"{100 * trainable / total:.2f}")
    Console().print(table)
    print(counts)


def _abstract_model(cfg):
    from jaxtune.hf import load as hf
    from jaxtune.run.tasks import open_task

    folder = hf.resolve(cfg.model.path)
    return folder, open_task(cfg, hf.read_config(folder)), cfg.model.init, cfg.model.quantization
