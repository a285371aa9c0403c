"""What tuning cost: text and tasks outside the tuning data, base beside tuned.

Beside what `answers` measures of rows, by domain, there are the divergence of the tuned model from the base on each
token, KL(tuned || base), and the answers that flipped from right to wrong and back, with McNemar's exact test. General
text that the tuning data holds too would hide what was lost, and is left out.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxtune import data
from jaxtune.curate.overlap import unshared
from jaxtune.errors import UserError
from jaxtune.evaluate import statistics
from jaxtune.evaluate.answers import Answers, Measured, columns, measure_answers, row_records
from jaxtune.evaluate.comparison import Column
from jaxtune.evaluate.evaluation import Options, Part, Progress, settings_of, tuning_rows
from jaxtune.evaluate.kept import Kept, in_batches, key_of
from jaxtune.evaluate.rows import data_names, read_rows
from jaxtune.evaluate.systems import System
from jaxtune.infer.logprobs import batches_by_length, beside, most_tokens


@dataclass
class Tuned(Measured):
    """What the tuned model did; kl: of each row, the sum over its tokens."""

    kl: list[float] = field(default_factory=list)


class General(Answers):
    """The evaluator of text outside the tuning data; see `jaxtune.evaluate.evaluation.Evaluator`."""

    def __init__(self, source: Any, cfg: Any, options: Options, flag: str = "--forgetting"):
        self.flag = flag
        if source.run is None and source.adapter is None:
            raise UserError(
                f"{flag}: {source.model} is a whole model and names no base to compare with; give a run, or an adapter."
            )
        super().__init__(source, cfg, options)
        if not self.base:
            raise UserError(f"{flag} compares with the base, and there is none: the run began on random weights.")
        self.notes += self.overlap
        if options.group_by is None and len(set(self.files)) > 1:
            self.groups = self.files

    def _read(self, options: Options, virtual: int) -> int:
        from jaxtune import models
        from jaxtune.hf.load import read_config
        from jaxtune.objectives.task import DEFAULT_LENGTH

        spec = models.build(read_config(self.source.model)).spec
        settings, names, keep, fraction = self._sources(options)
        if options.data:
            settings |= {"format": options.format or "auto", "columns": options.columns or {}}
        self.names = data_names(names)
        self.overlap: list[str] = []

        def chosen(rows: data.Rows) -> np.ndarray:
            kept = keep(rows)
            if not kept.any():
                raise UserError(f"{self.flag}: no held-out row is of a mixed-in source; give {self.flag}=FILE.")
            rest, said = self._unshared(rows.select(kept))
            self.overlap += said
            kept[kept] = rest
            return kept

        self.rows, self.lines = read_rows(
            self.tokenizer,
            names,
            group_by=options.group_by,
            limit=options.rows,
            keep=chosen,
            eval_fraction=fraction,
            max_length=min(spec.positions, DEFAULT_LENGTH) - virtual,
            overlength="split",
            vocab_size=spec.vocab,
            **settings,
        )
        self.files = [row.file for row in self.rows]
        return spec.positions

    def _sources(self, options: Options) -> tuple[dict[str, Any], Sequence[str], Any, float]:
        """(settings, sources, rows -> which count, the share held out) of the general text."""
        if options.data:
            return data.reading(settings_of(None).data), options.data, lambda rows: np.ones(len(rows), bool), 0.0
        cfg = self.cfg
        if cfg is None:
            raise UserError(f"{self.flag}: {self.source.adapter} is no run; name general text: {self.flag}=FILE.")
        names = data_names(cfg.data.train)
        if len(names) < 2 or not cfg.data.eval_fraction:
            why = "has one source" if len(names) < 2 else "is held out by no data.eval_fraction"
            raise UserError(
                f"{self.flag}: general text is the held-out part of mixed-in sources, and data.train of "
                f"{self.source.run} {why}; name files outside the tuning data: {self.flag}=FILE."
            )
        task = data.read(names[0]).label
        return (
            data.reading(cfg.data),
            cfg.data.train,
            lambda rows: np.array([rows.labels[s] != task for s in rows.source]),
            cfg.data.eval_fraction,
        )

    def _unshared(self, rows: data.Rows) -> tuple[np.ndarray, list[str]]:
        every = np.ones(len(rows), bool)
        if self.cfg is None:
            return every, ["Only a run says what it was tuned on: whether that holds the general text is not known."]
        try:
            tuning = self._tuning
        except UserError as error:
            return every, [f"Whether the tuning data holds the general text could not be seen: {error}"]
        return unshared(rows, tuning, self.tokenizer, self.flag)

    @functools.cached_property
    def _tuning(self) -> data.Rows:
        """The rows that the run was tuned on."""
        return tuning_rows(self.cfg, self.tokenizer)

    def measure(self, system: System, kept: Kept, progress: Progress) -> Measured:
        """The base's answers; then the tuned model's, and the nats of both in one pass."""
        found = measure_answers(system, self.rows, self.tokenizer, self.request, kept, progress)
        if system.name == "base":
            self._base = system, found
            return found
        base, before = self._base
        masks = [row.mask[1:] for row in self.rows]

        def sums(batch):
            modules, params = (base.module, system.module), (base.params, system.params)
            rows = beside(modules, params, [self.rows[i].tokens for i in batch], [masks[i] for i in batch])
            return [[float(row.base.sum()), float(row.tuned.sum()), float(row.kl.sum())] for row in rows]

        keys = [key_of("beside", base.identity, system.identity, row.tokens, row.mask) for row in self.rows]
        batches = batches_by_length([len(row.tokens) for row in self.rows], most_tokens())
        values = in_batches(kept, keys, batches, sums, progress("base and tuned: loss", len(self.rows)))
        after = Tuned(**vars(found))
        before.nats, after.nats, after.kl = map(list, zip(*values, strict=True))
        return after

    def columns(self, measured: Mapping[str, Measured]) -> dict[str, Column]:
        found = columns(self.rows, measured, self.request)
        apart = np.stack([measured["tuned"].kl, measured["tuned"].tokens], axis=1)
        kl = Column("KL(tuned ‖ base), nats a token", 0, False, statistics.mean, {"tuned": apart}, found["loss"].at)
        loss = Column("loss on general text", *_fields(found.pop("loss")))
        return {"loss": loss, "perplexity": found.pop("perplexity"), "kl": kl, **found}

    def records(self, measured: Mapping[str, Measured], found: Mapping[str, Column]) -> Iterator[dict[str, Any]]:
        both = {name: column for name, column in found.items() if name != "kl"}
        for record, kl in zip(row_records(self.rows, measured, both), measured["tuned"].kl, strict=True):
            record["tuned"]["kl"] = kl / max(1, record["tuned"]["tokens"])
            yield record


def _fields(column: Column) -> tuple:
    return column.better, column.share, column.statistic, column.values, column.at


def flips(evaluator: Any, measured: Mapping[str, Any], found: Mapping[str, Column]) -> dict[str, Any]:
    """{"flips": {metric: {label, rows, right (base, tuned), lost, gained, p, verdict}}} of metrics that are yes or no.

    p-values are Holm's over the metrics.
    """
    told = {}
    for name, column in found.items():
        base, tuned = column.values.get("base"), column.values["tuned"]
        if base is not None and name == "accuracy":
            base, tuned = base[:, 0] == base[:, 1], tuned[:, 0] == tuned[:, 1]
        if base is None or base.ndim > 1 or not np.isin(np.concatenate([base, tuned]), (0, 1)).all():
            continue
        test = statistics.mcnemar(base, tuned)
        right = {"base": int(np.sum(base)), "tuned": int(np.sum(tuned))}
        told[name] = {"label": column.label, "rows": len(base), "right": right} | test._asdict()
    for entry, p in zip(told.values(), statistics.holm([e["p"] for e in told.values()]), strict=True):
        entry["p"] = p
        entry["verdict"] = statistics.verdict(entry["gained"] - entry["lost"], p, 1)
    return {"flips": told} if told else {}


FORGETTING = Part("forgetting", General, "forgetting.jsonl", flips)
