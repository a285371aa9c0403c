"""`jaxtune compare`: several runs in one table, with what `jaxtune eval` measured, and on one page."""

from pathlib import Path

from jaxtune.errors import UserError
from jaxtune.flags import Flag, parse_options

USAGE = """usage: jaxtune compare RUN RUN [RUN ...] [--out=FILE.html]

Prints a table of the runs, best first: settings in which they differ, losses, and the scores in their eval.json, where
`jaxtune eval` has written one. Writes the page that compares them, as `jaxtune report RUN RUN` does."""

ARGUMENTS = {"RUN": Flag("directories of runs (the --workdir of jaxtune train)", list, required=True)}
FLAGS = {"out": Flag("the page to write; default: report.html beside the first run", Path)}


def main(argv: list[str]) -> None:
    options = parse_options(argv, FLAGS, ARGUMENTS, usage=USAGE)
    if len(options.RUN) < 2:
        raise UserError("compare takes two runs or more; `jaxtune report RUN` writes the page of one.")
    if options.out is not None and options.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out={options.out}: expected a file that ends in .html")
    from rich.console import Console
    from rich.table import Table

    from jaxtune.report import write_comparison
    from jaxtune.report.compare import evaluation_notes, evaluation_rows, result_rows
    from jaxtune.report.run import read_run

    runs = [read_run(folder) for folder in options.RUN]
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    for heads, rows in (result_rows(runs), evaluation_rows(runs)):
        if rows:
            lines = [heads, *([str(cell[1] if isinstance(cell, tuple) else cell) for cell in row] for row in rows)]
            widths = [max(map(len, column)) for column in zip(*lines)]
            if sum(widths) + 3 * len(widths) + 1 > console.width and len(lines) < len(widths):  # or no word is readable
                lines = list(zip(*lines))
            table = Table(*lines[0])
            for line in lines[1:]:
                table.add_row(*line)
            console.print(table)
    for note in evaluation_notes(runs):
        console.print(note, markup=False)
    print(write_comparison(options.RUN, options.out))
