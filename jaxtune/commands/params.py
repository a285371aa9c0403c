"""`jaxtune params`: which parameters a config would train. Nothing is loaded but config.json."""

from jaxtune.cli import parse

USAGE = """usage: jaxtune params --config=FILE.py [--config.section.key=value ...]

Show which parameters a config trains, in total and by module. Reads the model's config.json only."""


def main(argv: list[str]) -> None:
    cfg, _ = parse(argv, usage=USAGE, required=("model.path",))
    from rich.console import Console
    from rich.table import Table

    from jaxtune.config.recipe import experiment

    counts = experiment(cfg, weights=False).recipe.abstract.counts
    table = Table("module", "trainable", "all", "%", title=cfg.model.path)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (trainable, total) in counts.groups.items():
        table.add_row(name, f"{trainable:,}", f"{total:,}", f"{100 * trainable / total:.2f}")
    Console(markup=False).print(table)
    print(counts)
