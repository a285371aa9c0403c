"""Reports: one self-contained HTML page for a run, a sweep, or several runs. Needs neither jax nor a network."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxtune.errors import UserError


def write_report(run_dir: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """Write the page of a run.

    Args:
      run_dir: holds config.json and metrics.jsonl, and summary.json if the run has ended.
      out: the page; default: `report.html` in `run_dir`. An older page is replaced.

    Returns:
      where the page is.

    Raises:
      UserError: `run_dir` is not a run, or has logged nothing.
    """
    from jaxtune.report.page import run_page
    from jaxtune.report.run import read_run

    run = read_run(run_dir)
    with _as_written(run.folder):
        page = run_page(run)
    return _write(Path(out) if out else run.folder / "report.html", page)


@contextmanager
def _as_written(folder: Path) -> Iterator[None]:
    """Turn errors from a damaged file of a run, which its reader did not notice, into one sentence.

    Raises:
      UserError: in its place.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"{folder}: eval.json, summary.json or config.json is not as jaxtune wrote it ({type(error).__name__}: "
            f"{error}). Remove the damaged file; `jaxtune eval` writes eval.json again."
        ) from error


def write_comparison(run_dirs: Sequence[str | os.PathLike], out: str | os.PathLike | None = None) -> Path:
    """Write one page with several runs.

    Args:
      run_dirs: two directories or more, as `write_report` takes them.
      out: the page; default: `report.html` beside the first run.

    Returns:
      where the page is.

    Raises:
      UserError: as `write_report`; or a run is named twice.
    """
    from jaxtune.report.compare import comparison_page
    from jaxtune.report.run import read_run

    if len(run_dirs) < 2:
        raise ValueError(f"a comparison takes two runs or more, not {len(run_dirs)}")
    runs = [read_run(folder) for folder in run_dirs]
    places = [run.folder.resolve() for run in runs]
    twice = next((run for run, place in zip(runs, places) if places.count(place) > 1), None)
    if twice:
        raise UserError(f"{twice.folder} is given twice; name each run once")
    out = Path(out) if out else places[0].parent / "report.html"
    return _write(out, comparison_page(runs, out.parent))


def write_sweep(folder: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """Write the page of a sweep, finished or not.

    Args:
      folder: what `jaxtune sweep` or launch/sweep_lr.sh writes: sweep.json and a run directory for each of its points.
      out: the page; default: `report.html` in `folder`. An older page is replaced.

    Returns:
      where the page is.

    Raises:
      UserError: `folder` is not a sweep, none of its runs has logged anything, or one of its files is not what a sweep
        writes.
    """
    from jaxtune.report.sweep import read_sweep
    from jaxtune.report.sweep_page import sweep_page

    sweep = read_sweep(folder)
    out = Path(out) if out else sweep.folder / "report.html"
    return _write(out, sweep_page(sweep, out.parent))


def _write(out: Path, page: str) -> Path:
    from jaxtune.files import atomic_write_text

    atomic_write_text(out, page)
    return out
