"""Data: sources -> columns and formats -> chat templates -> tokens and masks -> packing -> batches. No jax here."""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.data.batches import (
    Batches,
    EvalBatches,
    Prefetch,
    side_by_side,
    with_beside,
    with_features,
    with_reference,
)
from jaxtune.data.blocks import Streamed, streamed
from jaxtune.data.chat import DEFAULT_TEMPLATE
from jaxtune.data.formats import check_columns, make_reader
from jaxtune.data.labels import LabelForm
from jaxtune.data.preview import render_plain, render_rows
from jaxtune.data.row_form import RowForm
from jaxtune.data.rows import Report, Rows, SourceReport, check_vocabulary, fit
from jaxtune.data.sources import Source, read
from jaxtune.data.streaming import StreamedBatches
from jaxtune.data.tokenize import FORMAT_VERSION, Encoder, rows_of, stored, tokenise
from jaxtune.data.tokenizer import load_tokenizer, tokenizer_digest
from jaxtune.errors import UserError

__all__ = [
    "DEFAULT_TEMPLATE",
    "Batches",
    "EvalBatches",
    "LabelForm",
    "Prefetch",
    "Report",
    "RowForm",
    "Rows",
    "Source",
    "SourceReport",
    "Streamed",
    "StreamedBatches",
    "held_out",
    "load_tokenizer",
    "prepare",
    "read",
    "reader_settings",
    "reading",
    "render_plain",
    "render_rows",
    "side_by_side",
    "source_names",
    "with_beside",
    "with_features",
    "with_reference",
]


def prepare(
    tokenizer,
    train: str | Sequence[str],
    *,
    eval: str | Sequence[str] | None = None,
    eval_fraction: float = 0.0,
    labels: RowForm | None = None,
    allow_left_out: Sequence[str] = (),
    max_length: int,
    overlength: str = "drop",
    vocab_size: int | None = None,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    streaming: bool = False,
    say: Callable[[str], None] = print,
    **reading: Any,
) -> tuple[list[Rows] | list[Streamed], Rows | None, Report]:
    """Read and tokenise data: (training rows of each source, evaluation rows or None, report).

    Args:
        tokenizer: a fast tokenizer of transformers.
        train: training data: sources as `read` takes them, as a sequence or separated by commas.
        eval: held-out data, given in the same way.
        eval_fraction: instead of `eval`, the share of the training rows to hold out: those with the lowest hashes of
            their content, at least one. It depends on no seed or order of rows, and equal rows are never divided;
            nor are those with one prompt, where answers are judged.
        labels: how to read labelled rows; `reading` then has no effect. None: rows of text.
        allow_left_out: what the chat template may leave out of a trained turn; see `ChatRenderer`.
        max_length: tokens of a row at most.
        overlength: what happens to longer rows; see `fit`.
        vocab_size: rows of the model's embedding, to check the tokens against; None: no check.
        cache: keep tokens on disk, by content.
        cache_dir: where; default: tokens/ in $JAXTUNE_CACHE or ~/.cache/jaxtune.
        streaming: the training rows stay on disk, in the cache, and are given as `Streamed`; rows of text only.
        say: is told how far a long tokenisation is, with `streaming`.
        reading: format, columns, template, completion_from, system and the others of `reader_settings`, for all
            sources.

    Raises:
        UserError: something is wrong with the input; the message names file, row or field.
    """
    if eval and eval_fraction:
        raise UserError("give either data.eval or data.eval_fraction, not both.")
    if not 0 <= eval_fraction < 1:
        raise UserError(f"data.eval_fraction: {eval_fraction}: expected a share of 0 or more, below 1.")
    if streaming and (labels is not None or eval_fraction or not cache):
        what = "labels" if labels is not None else "eval_fraction" if eval_fraction else "cache=False"
        raise UserError(f"streaming does not go with {what}: rows of text lie in the cache, and data.eval has its own.")
    labels = None if labels is None else labels.on(tokenizer)
    opened = [read(name, streaming=streaming) for names in (train, eval) if names for name in source_names(names)]
    if labels is not None:
        labels.opened(opened)
    settings = reader_settings(tokenizer, **reading) if labels is None else labels.settings
    check_columns(opened, settings.get("columns") or {})
    common = [
        FORMAT_VERSION,
        tokenizer_digest(tokenizer),
        DEFAULT_TEMPLATE,
        [settings, sorted(allow_left_out)],
        [importlib.metadata.version(name) for name in ("transformers", "tokenizers")],
    ]
    keys = []

    def load(name: str) -> tuple[Rows, SourceReport, Any]:
        source = read(name)
        reader = make_reader(source, **settings) if labels is None else labels.reader(source)
        key = _hash([*common, source.digest()])
        encoder = Encoder(tokenizer, allow_left_out) if labels is None else labels.encoder(tokenizer)
        rows, report = tokenise(source, reader, encoder, key, cache=cache, cache_dir=cache_dir)
        if vocab_size is not None:
            check_vocabulary(int(rows.tokens.max(initial=0)), vocab_size, tokenizer)
        keys.append(key)
        report.lost = rows.lost
        return rows, report, encoder

    def load_fitted(name: str) -> tuple[Rows, SourceReport]:
        whole, report, encoder = load(name)
        lengths = None if labels is None else labels.lengths(whole)
        then = "drop" if labels is not None and labels.cuts_itself else overlength
        rows = fit(whole, max_length, then, report, encoder.FIRST, lengths)
        if labels is not None:
            rows = encoder.closed(rows, max_length, whole)
        if not len(rows):
            raise _nothing_left(report)
        return rows, report

    def load_streamed(name: str) -> tuple[Streamed, SourceReport]:
        source = read(name, streaming=True)
        reader, encoder = make_reader(source, **settings), Encoder(tokenizer, allow_left_out)
        key = _hash([*common, source.digest()])
        folder, blocks, report = stored(source, reader, encoder, key, cache_dir, say)
        keys.append([key, "streaming", blocks["rows"].tolist()[:2]])
        rows = streamed(
            folder,
            len(blocks),
            lambda i, verify: rows_of(source, encoder, folder, blocks, i, verify),
            report,
            max_length=max_length,
            overlength=overlength,
            first=encoder.FIRST,
            check=lambda largest: None if vocab_size is None else check_vocabulary(largest, vocab_size, tokenizer),
        )
        if not len(rows):
            raise _nothing_left(report)
        return rows, report

    report = Report()
    loaded = [(load_streamed if streaming else load_fitted)(name) for name in source_names(train)]
    report.sources = [r for _, r in loaded]
    train_rows = [rows for rows, _ in loaded]
    eval_rows = None
    if eval:
        loaded = [load_fitted(name) for name in source_names(eval)]
        report.eval_sources = [r for _, r in loaded]
        eval_rows = Rows.concatenate([rows for rows, _ in loaded])
    elif eval_fraction:
        train_rows, eval_rows = _hold_out(train_rows, eval_fraction)
    if labels is not None:
        labels.check(train_rows)
    report.train_rows = sum(map(len, train_rows))
    report.eval_rows = len(eval_rows) if eval_rows is not None else 0
    report.fingerprint = _hash([keys, len(train_rows), max_length, overlength, eval_fraction])
    return train_rows, eval_rows, report


def reader_settings(
    tokenizer,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    completion_from: str | None = None,
    prompt_from: str | None = None,
    system: str | None = None,
    system_as_user: bool = False,
    roles: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    chat: bool | None = None,
) -> dict:
    """Return the keyword arguments of `make_reader` for a tokenizer.

    `chat`: read prompt/completion and instruction rows as a conversation; None: if the tokenizer has a chat template.
    Otherwise prompt and completion are joined as they are, with a newline between them if neither has white space
    there.
    """
    return {
        "format": format,
        "columns": dict(columns or {}),
        "template": template,
        "completion_from": completion_from,
        "prompt_from": prompt_from,
        "system": system,
        "system_as_user": system_as_user,
        "roles": dict(roles or {}),
        "ignore": tuple(ignore or ()),
        "chat": bool(tokenizer.chat_template) and template is None if chat is None else chat,
    }


def reading(section: Any) -> dict[str, Any]:
    """Return the options for reading text in section `data` of a config, for `prepare` and `curate.examine`."""
    names = ("format", "template", "completion_from", "prompt_from", "system", "system_as_user")
    return {
        **{name: getattr(section, name) for name in names},
        "columns": dict(section.columns),
        "roles": dict(section.roles),
        "ignore": section.ignore or (),
        "allow_left_out": section.allow_left_out or (),
    }


def source_names(sources: str | Sequence[str]) -> list[str]:
    """Return the sources in data.train or data.eval as a list."""
    if not isinstance(sources, str):
        names = list(sources)
    elif Path(sources).exists():  # a name with a comma in it
        names = [sources]
    else:
        names = [name.strip() for name in sources.split(",") if name.strip()]
    if not names:
        raise UserError("data.train: no source given.")
    return names


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:40]


def held_out(digests: np.ndarray, fraction: float) -> np.ndarray:
    """Return which rows are held out, bool[N]: those with the lowest digests u64[N], at least one.

    Their upper halves decide, which rows with one prompt share where a task judges answers (`Reader.digest`).
    """
    upper = np.asarray(digests, np.uint64) >> np.uint64(32)
    return upper <= np.sort(upper)[max(1, round(fraction * len(digests))) - 1]


def _hold_out(train: list[Rows], fraction: float) -> tuple[list[Rows], Rows]:
    """Split off the rows that `held_out` chooses."""
    digests = np.concatenate([rows.digest for rows in train])
    held = np.split(held_out(digests, fraction), np.cumsum([len(rows) for rows in train])[:-1])
    kept = [rows.select(~h) for rows, h in zip(train, held)]
    if not all(len(rows) for rows in kept):
        raise UserError(f"data.eval_fraction: {fraction} of {len(digests)} rows leaves a source without training rows.")
    return kept, Rows.concatenate([rows.select(h) for rows, h in zip(train, held) if h.any()])


def _nothing_left(report: SourceReport) -> UserError:
    whole = report.format in ("preference", "kto")  # an answer is judged whole, and is not split
    if report.equal == report.rows:
        why = "the two answers of every pair are equal: see that data.columns names two columns"
    elif report.too_long == report.rows and report.overlength == "drop":
        why = (
            f"every row is over data.max_length={report.max_length} tokens (the longest has {report.longest}): "
            f"raise it, or set data.overlength to truncate{'' if whole else ' or split'}"
        )
    elif report.too_long and report.overlength != "split":
        why = (
            f"{report.too_long:,} of them are over data.max_length={report.max_length}, and within it no trained token "
            f"is left: raise it{'' if whole else ', or set data.overlength=split'}"
        )
    elif report.format in ("chat", "sharegpt"):
        why = "no conversation has an assistant's turn"
    else:
        why = "the completions are empty"
    return UserError(f"{report.name}: none of its {report.rows:,} rows has a token to train on: {why}.")
