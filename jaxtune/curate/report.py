"""Run all checks over the data of a config; the findings as a value, as JSON and on a terminal."""

import heapq
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.curate.answers import answer_checks
from jaxtune.curate.balance import Balance, label_notes
from jaxtune.curate.finding import ERROR, NOTE, SEVERITIES, WARNING, Finding
from jaxtune.curate.near import NearDuplicates
from jaxtune.curate.rows import Check, label_row_checks, row_checks
from jaxtune.curate.sets import SetCheck, set_checks
from jaxtune.curate.stream import (
    EVAL,
    TRAIN,
    Chunk,
    Ledger,
    Opened,
    chunks,
    label_form,
    text_form,
)
from jaxtune.curate.texts import text_checks
from jaxtune.curate.tokens import EmptyMasks, Lengths, NotUsed, Packing, TokenQuality
from jaxtune.data import RowForm, held_out, reader_settings, source_names
from jaxtune.data.formats import check_columns
from jaxtune.data.preview import runs
from jaxtune.data.sources import read
from jaxtune.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

PERCENTILES = (50, 90, 95, 99, 100)
BINS = 12
COLOURS = {ERROR: "bold red", WARNING: "yellow", NOTE: "dim"}


class NothingLeft(SetCheck):
    """Training refuses data that leaves it no row."""

    def __init__(self, overlength: str):
        self.overlength = overlength

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        if not kept(ledger, self.overlength).any():
            yield Finding(
                "nothing_left",
                ERROR,
                f"none of the {int((ledger.split == TRAIN).sum()):,} training rows is left to train on",
                "the other findings say why; check data.max_length, data.columns and the chat template",
            )


class Samples:
    """A few rows with their trained tokens, drawn by hash, so that the order of rows does not matter."""

    def __init__(self, tokenizer: Any, n: int, labels: RowForm | None = None):
        self.tokenizer, self.n, self.labels = tokenizer, n, labels
        self._heap: list[tuple[int, int, str, Any]] = []

    def see(self, chunk: Chunk) -> None:
        for k in np.argsort(chunk.digests, kind="stable")[: self.n].tolist():
            span = slice(int(chunk.start[k]), int(chunk.end[k]))
            row = (chunk.ids[span], chunk.mask[span]) if self.labels is None else chunk.examples[k]
            heapq.heappush(self._heap, (-int(chunk.digests[k]), -chunk.first - k, chunk.where(k), row))
            if len(self._heap) > self.n:
                heapq.heappop(self._heap)

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        return iter(())

    def drawn(self) -> list[tuple[str, list[tuple[str, bool]]]]:
        """Return (place, [(text, trained), ...]) of each."""
        chosen = sorted(self._heap, key=lambda entry: entry[:2], reverse=True)
        return [(place, self._pieces(row)) for _, _, place, row in chosen]

    def _pieces(self, row: Any) -> list[tuple[str, bool]]:
        if self.labels is None:
            return runs(self.tokenizer, *row)
        return self.labels.pieces(row)


@dataclass
class DataReport:
    """What was found.

    Attributes:
        findings: the worst first.
        summary: numbers of the training data as a whole, JSON.
        samples: see `Samples.drawn`.
        ledger: numbers on each row; findings refer to its indices.
    """

    findings: list[Finding]
    summary: dict[str, Any]
    samples: list[tuple[str, list[tuple[str, bool]]]]
    ledger: Ledger

    def count(self, severity: str) -> int:
        return sum(f.severity == severity for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        samples = [
            {"row": place, "pieces": [{"text": text, "trained": trained} for text, trained in pieces]}
            for place, pieces in self.samples
        ]
        report = {"summary": self.summary, "findings": [f.as_json() for f in self.findings], "samples": samples}
        return json.loads(json.dumps(report, default=str))  # values of columns may be of any type

    def print(self, console: "Console") -> None:
        """Show the numbers, the lengths, the rows drawn and the findings."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="training data", show_header=False, title_justify="left")
        for name, value in _facts(self.summary):
            table.add_row(name, printable(value))
        console.print(table)
        if lengths := self.summary.get("lengths"):
            console.print(Text(_histogram(lengths, self.summary["max_length"])))
        for column, groups in self.summary["groups"].items():
            shown = ", ".join(f"{g['value']} {g['rows']:,}" for g in groups[:6])
            more = f", ... ({len(groups)} values)" if len(groups) > 6 else ""
            console.print(Text(printable(f"by {column}: {shown}{more}")))
        for place, pieces in self.samples:
            console.print(Text(printable(f"\n{place}"), style="bold"))
            text = Text()
            for piece, trained in pieces:
                marked = f"⟦{piece}⟧" if trained and console.color_system is None else piece
                text.append(printable(marked), style="green" if trained else "dim")
            console.print(text)
        console.print()
        for finding in self.findings:
            head = Text(f"{finding.severity:<7} ", style=COLOURS[finding.severity])
            head.append(f"{finding.check}: ", style="bold")
            head.append(printable(finding.message), style="default")
            console.print(head)
            console.print(Text(printable(f"        -> {finding.fix}"), style="cyan"))
            for row in finding.rows:
                console.print(Text(printable(f"           {row}"), style="dim"))
        counts = ", ".join(f"{self.count(s)} {s}{'s' * (self.count(s) != 1)}" for s in SEVERITIES)
        console.print(Text(counts if self.findings else "nothing found", style="bold"))


def examine(
    tokenizer: Any,
    train: str | Sequence[str],
    *,
    eval: str | Sequence[str] | None = None,
    eval_fraction: float = 0.0,
    labels: RowForm | None = None,
    allow_left_out: Sequence[str] = (),
    max_length: int,
    overlength: str = "drop",
    packing: bool = False,
    rows_a_batch: int = 8,
    group_by_length: bool = False,
    positions: int | None = None,
    vocab_size: int | None = None,
    near: float = 0.8,
    samples: int = 3,
    progress: Callable[[int], None] = lambda rows: None,
    **reading: Any,
) -> DataReport:
    """Read data as `jaxtune.data.prepare` does, and report what is wrong with it. The rows are never all in memory.

    Args:
        tokenizer: a fast tokenizer of transformers.
        train: as `prepare` takes it.
        eval: as `prepare` takes it.
        eval_fraction: as `prepare` takes it.
        labels: as `prepare` takes it; None: rows of text.
        allow_left_out: as `prepare` takes it.
        max_length: tokens of a row at most.
        overlength: as `prepare` takes it.
        packing: whether several rows share a line of a batch; with it padding is measured on packed lines.
        rows_a_batch: rows of a batch, to measure padding.
        group_by_length: whether batches are made of rows of similar length, to measure padding.
        positions: tokens of the longest row that the model can read; default: max_length.
        vocab_size: rows of the model's embedding, to check token ids against; None: not checked.
        near: the similarity, in (0, 1], from which rows are near duplicates; 0: do not look for them.
        samples: how many rows to show.
        progress: called with the number of rows read so far.
        reading: as `prepare` takes it.

    Raises:
        UserError: a source cannot be opened, or read to its end, or its columns fit no format.
    """
    if labels is None:
        form = text_form(tokenizer, reader_settings(tokenizer, **reading), allow_left_out)
    else:
        labels = labels.on(tokenizer)
        form = label_form(tokenizer, labels)
    opened = [read(name) for names in (train, eval) if names for name in source_names(names)]
    check_columns(opened, (reading if labels is None else labels.settings).get("columns") or {})
    labelled = labels is not None and not labels.text
    sources = []
    for split, names in ((TRAIN, source_names(train)), (EVAL, source_names(eval) if eval else [])):
        sources += [Opened(source, form.reader(source), split) for source in map(read, names)]
    ledger = Ledger(sources, max_length)
    several = labels is not None and (labels.per_token or labels.several)
    balance = Balance(labels.classes_of if several else None)
    packed = Packing(overlength, packing or labels is not None, rows_a_batch, group_by_length)
    quality, drawn = (
        TokenQuality(tokenizer, vocab_size, labelled=labelled),
        Samples(tokenizer, samples, labels),
    )
    checks: list[Check] = [
        *(label_row_checks(tokenizer, labels) if labelled else row_checks(tokenizer)),
        NothingLeft(overlength),
        *set_checks(labelled=labelled, judged=labels is not None and (labels.judged or labels.belongs)),
        *answer_checks(labels),
        *text_checks(labels, rows_a_batch),
        *([NearDuplicates(near)] if near else []),
        Lengths(overlength, positions or max_length),
        EmptyMasks(overlength),
        NotUsed([opened.reader.notes for opened in sources], form.encoder),
        packed,
        quality,
        balance,
        drawn,
    ]
    for chunk in chunks(sources, form):
        ledger.see(chunk)
        for check in checks:
            check.see(chunk)
        progress(chunk.first + len(chunk) + len(chunk.broken))
    ledger.close()
    if eval_fraction and not eval:
        _hold_out(ledger, eval_fraction, overlength)
    findings = [finding for check in checks for finding in check.findings(ledger)]
    findings += label_notes(labels) if labels is not None else ()
    findings.sort(key=lambda f: SEVERITIES.index(f.severity))
    return DataReport(findings, _summary(ledger, overlength, quality, balance, packed), drawn.drawn(), ledger)


def kept(ledger: Ledger, overlength: str) -> np.ndarray:
    """Which rows are trained on, bool[N]: readable, within the limit or cut to it, with a token to predict."""
    long = ledger.length > ledger.max_length
    trained = {"drop": (ledger.trained > 0) & ~long, "truncate": ledger.fitted > 0, "split": ledger.trained > 0}
    return ledger.readable & (ledger.split == TRAIN) & trained[overlength]


def _hold_out(ledger: Ledger, fraction: float, overlength: str) -> None:
    """Mark the rows that training would hold out as evaluation rows."""
    rows = np.flatnonzero(kept(ledger, overlength))
    if not len(rows):
        return
    pieces = np.ones(len(rows), np.int64)
    if overlength == "split":
        pieces = np.maximum(1, -(-(ledger.length[rows].astype(np.int64) - 1) // (ledger.max_length - 1)))
    digests = np.repeat(ledger.digest[rows], pieces)
    chosen = np.isin(ledger.digest[rows], digests[held_out(digests, fraction)])
    ledger.split[rows[chosen]] = EVAL


def _summary(
    ledger: Ledger, overlength: str, quality: TokenQuality, balance: Balance, packed: Packing
) -> dict[str, Any]:
    rows, used = ledger.rows(TRAIN), kept(ledger, overlength)
    lengths, limit = ledger.length[rows], ledger.max_length
    tokens = ledger.length[used] if overlength == "split" else np.minimum(ledger.length[used], limit)
    trained = ledger.trained[used] if overlength == "split" else ledger.fitted[used]
    summary = {
        "sources": [
            {
                "name": opened.source.name,
                "format": opened.reader.format,
                "split": "train" if opened.split == TRAIN else "eval",
                "rows": int((ledger.source == i).sum()),
            }
            for i, opened in enumerate(ledger.sources)
        ],
        "rows": len(rows),
        "rows_trained": int(used.sum()),
        "eval_rows": len(ledger.rows(EVAL)),
        "tokens": int(tokens.sum()),
        "trained_tokens": int(trained.sum()),
        "max_length": limit,
        "overlength": overlength,
        "over_limit": int((lengths > limit).sum()),
        "tokens_beyond_limit": int(np.maximum(lengths.astype(np.int64) - limit, 0).sum()),
        "batch_used_padded": round(float(packed.padded), 4),
        "batch_used_packed": round(float(packed.packed), 4),
        "tokens_a_word": round(quality.tokens / max(quality.words, 1), 3),
        "unknown_share": quality.unknowns / max(quality.tokens, 1),
        "byte_share": quality.bytes / max(quality.tokens, 1),
        "groups": {
            column: [{"value": value, "rows": n} for value, n in counts.most_common()]
            for column, counts in balance.groups.items()
        },
    }
    return summary | length_summary(lengths)


def length_summary(lengths: np.ndarray) -> dict[str, Any]:
    """Percentiles and a histogram of rows by tokens, i64[N]; empty where there is no row."""
    if not len(lengths):
        return {}
    most, typical = int(lengths.max()), int(np.percentile(lengths, 99))
    even = np.linspace(0, typical + 1, BINS) if most > 1.5 * typical else np.linspace(0, most + 1, BINS + 1)
    counts, edges = np.histogram(lengths, bins=np.unique([*even.astype(int), most + 1]))  # a long tail is one bin
    percentiles = {str(p): int(np.percentile(lengths, p)) for p in PERCENTILES}
    return {"lengths": {"percentiles": percentiles, "edges": edges.tolist(), "counts": counts.tolist()}}


def _facts(s: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for source in s["sources"]:
        yield source["split"], f"{source['name']} ({source['format']}), {source['rows']:,} rows"
    yield "rows trained on", f"{s['rows_trained']:,} of {s['rows']:,}; {s['eval_rows']:,} to evaluate on"
    share = f" ({s['trained_tokens'] / s['tokens']:.0%})" if s["tokens"] else ""
    whole = all(source["format"] == "text and label" for source in s["sources"])  # a label is for all of a text
    yield "tokens", f"{s['tokens']:,}" + ("" if whole else f", {s['trained_tokens']:,}{share} trained")
    fate = {"drop": "dropped", "truncate": "cut", "split": "split"}[s["overlength"]]
    yield "data.max_length", f"{s['max_length']:,}: {s['over_limit']:,} rows {fate}"
    yield "tokens in a batch", f"{s['batch_used_padded']:.0%} padded, {s['batch_used_packed']:.0%} packed; rest padding"
    yield "tokens a word", f"{s['tokens_a_word']:.2f}; {s['unknown_share']:.2%} unknown, {s['byte_share']:.2%} bytes"


def _histogram(lengths: Mapping[str, Any], limit: int) -> str:
    """Bars of the rows by tokens, with a mark at the limit."""
    most = max(lengths["counts"])
    lines = ["tokens a row: " + ", ".join(f"{p}% up to {n:,}" for p, n in lengths["percentiles"].items())]
    for low, high, n in zip(lengths["edges"], lengths["edges"][1:], lengths["counts"]):
        mark = " <- data.max_length" if low <= limit < high else ""
        lines.append(f"{low:>7,} - {high - 1:<7,} {'█' * -(-30 * n // most) if n else '':<30} {n:,}{mark}")
    return "\n".join(lines)
