"""`jaxtune report`: write the page of a run or a sweep again, or one page that compares several runs."""

from jaxtune.errors import UserError
from jaxtune.flags import Flag, parse_options

USAGE = """usage: jaxtune report RUN [RUN ...] [--out=FILE.html]
       jaxtune report SWEEP [--out=FILE.html]

Given one run, or the directory of a sweep, writes its report.html again. Given several runs, writes one page that
compares them, beside the first.
A page is one file that opens in any browser without a network."""

ARGUMENTS = {"RUN": Flag("directories of runs (the --workdir of jaxtune train), or of one sweep", list, required=True)}
FLAGS = {"out": Flag("the page to write; default: report.html in the directory, or beside the first of several")}


def main(argv: list[str]) -> None:
    options = parse_options(argv, FLAGS, ARGUMENTS, usage=USAGE)
    from pathlib import Path

    from jaxtune.report import write_comparison, write_report, write_sweep
    from jaxtune.report.run import read_run
    from jaxtune.report.sweep import is_sweep
    from jaxtune.report.verdict import verdict

    out = None if options.out is None else Path(options.out).expanduser()
    if out is not None and out.suffix not in (".html", ".htm"):
        raise UserError(f"--out={options.out}: expected a file that ends in .html")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out={options.out}: there is no directory {out.parent}")
    runs = options.RUN
    if len(runs) > 1:
        print(write_comparison(runs, out))
    elif is_sweep(Path(runs[0]).expanduser()):
        print(write_sweep(runs[0], out))
    else:
        print(write_report(runs[0], out))
        for sentence in verdict(read_run(runs[0])):
            print(sentence)
