"""The findings on a run's data, for its page: from data_report.json, or from training's own checks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtune.errors import UserError
from jaxtune.report.words import percent

MOST_VALUES = 8  # of a column, shown as bars
COLUMNS = 4


class Column(NamedTuple):
    """A bar of the histogram: tokens, from `low` to `high`, its rows, its percentage of the plot; beyond the limit?"""

    low: int
    high: int
    rows: int
    height: float
    beyond: bool


class Share(NamedTuple):
    """A value of a column, with its rows and their percentage of the most frequent one's."""

    value: str
    rows: int
    width: float


@dataclass(frozen=True)
class DataView:
    """The findings and the numbers of a data set.

    Attributes:
        facts: (name, value) of the whole.
        findings: as in data_report.json, the worst first.
        histogram: of the tokens a row; `limit` is data.max_length.
        groups: column -> its most frequent values, and how many more there are.
        samples: (place, [(text, trained), ...]).
        glance: whether these are training's own checks, which find less than `jaxtune data`.
    """

    facts: list[tuple[str, str]]
    findings: list[dict[str, Any]]
    histogram: list[Column]
    limit: int
    groups: list[tuple[str, list[Share], int]]
    samples: list[tuple[str, list[tuple[str, bool]]]]
    glance: bool


def data_view(report: Mapping[str, Any], name: str) -> DataView | None:
    """Read a report on data; None where it is empty.

    Raises:
        UserError: `name` is not what jaxtune writes.
    """
    if not report:
        return None
    try:
        summary = report["summary"]
        return DataView(
            facts=list(_facts(summary)),
            findings=[_finding(entry) for entry in report["findings"]],
            histogram=_histogram(summary.get("lengths"), summary["max_length"]),
            limit=summary["max_length"],
            groups=[_group(column, values) for column, values in list(summary["groups"].items())[:COLUMNS]],
            samples=[
                (str(sample["row"]), [(str(piece["text"]), bool(piece["trained"])) for piece in sample["pieces"]])
                for sample in report["samples"]
            ],
            glance=bool(report.get("glance")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{name} is not what jaxtune data writes ({type(error).__name__}: {error}); remove it, or make it again."
        ) from None


def _finding(entry: Mapping[str, Any]) -> dict[str, Any]:
    severity = entry["severity"] if entry["severity"] in ("error", "warning") else "note"
    words = {name: str(entry[name]) for name in ("check", "message", "fix")}
    return {"severity": severity, **words, "rows": [str(row) for row in entry["rows"]]}


def _facts(s: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for source in s["sources"]:
        what = "training data" if source["split"] == "train" else "evaluation data"
        yield what, f"{source['name']} ({source['format']}), {source['rows']:,} rows"
    yield "rows trained on", f"{s['rows_trained']:,} of {s['rows']:,}; {s['eval_rows']:,} to evaluate on"
    if s["tokens"]:
        share = percent(s["trained_tokens"] / s["tokens"])
        yield "tokens", f"{s['tokens']:,}, of them {s['trained_tokens']:,} ({share}) trained"
    fate = {"drop": "dropped", "truncate": "cut", "split": "split"}[s["overlength"]]
    yield "limit", f"{s['max_length']:,} tokens: {s['over_limit']:,} rows are longer and {fate}"
    if "batch_used_packed" in s:
        yield (
            "tokens in a batch",
            f"{percent(s['batch_used_padded'])} padded, {percent(s['batch_used_packed'])} packed",
        )
    if s.get("tokens_a_word"):
        yield "tokens a word", f"{s['tokens_a_word']:.2f}; {percent(s['unknown_share'])} unknown"


def _histogram(lengths: Mapping[str, Any] | None, limit: int) -> list[Column]:
    if not lengths:
        return []
    most = max(lengths["counts"]) or 1
    spans = zip(lengths["edges"], lengths["edges"][1:], lengths["counts"], strict=False)
    return [Column(low, high - 1, n, round(100 * n / most, 2), low > limit) for low, high, n in spans]


def _group(column: str, values: list[Mapping[str, Any]]) -> tuple[str, list[Share], int]:
    most = max(entry["rows"] for entry in values) or 1
    shown = [Share(str(e["value"]), e["rows"], round(100 * e["rows"] / most, 2)) for e in values[:MOST_VALUES]]
    return str(column), shown, len(values) - len(shown)
