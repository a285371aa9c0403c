"""Data curation: find what is wrong with a data set, as training would read it, and write a clean one.

    sources -> stream.py (chunks, and a ledger of a few numbers a row) -> checks -> report.py, clean.py

A check sees every chunk once, then gives its findings (`rows.Check`); `report.examine` runs all checks. No jax here.
"""

from jaxtune.curate.clean import write_clean
from jaxtune.curate.finding import ERROR, NOTE, WARNING, Finding
from jaxtune.curate.report import DataReport, examine
from jaxtune.curate.training import glance

__all__ = ["ERROR", "NOTE", "WARNING", "DataReport", "Finding", "examine", "glance", "write_clean"]
