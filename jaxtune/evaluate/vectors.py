"""Vectors of held-out rows: what is found by them, how they agree with scores, and which of two texts is nearer.

rows of two texts or more         each first text is a query; the documents are all other texts of the rows
rows of a text and its class      each text is a query; the relevant documents are the others of its class. Besides,
                                  how k-means clusters agree with the classes, and a linear probe
rows of two texts and a score     Spearman's and Pearson's correlation of cosines with the scores
a directory in BEIR's layout      corpus.jsonl, queries.jsonl, qrels/test.tsv (`--data DIR`)
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.data.embeddings import texts_of
from jaxtune.errors import UserError
from jaxtune.evaluate import clusters, evaluation, retrieval, statistics
from jaxtune.evaluate.comparison import Column
from jaxtune.evaluate.evaluation import Options, Progress
from jaxtune.evaluate.kept import Kept
from jaxtune.evaluate.known import KNOWN
from jaxtune.evaluate.rows import data_names, group_values, tokenised
from jaxtune.evaluate.systems import System
from jaxtune.infer.source import Tuned, tokenizer_of
from jaxtune.infer.vectors import Embedder, open_embedder, pooled_of
from jaxtune.objectives.contrasts import BINARY, CLASS, SCORE

NEIGHBOURS = 3  # shown of each query


class Vectors:
    """The `jaxtune.evaluate.evaluation.Evaluator` of models that give vectors."""

    def __init__(self, source: Tuned, cfg: Any, options: Options):
        options.refuse(("format", "metrics", "schema", "scorer", "labels", "max_new_tokens"), "vectors of texts")
        self.source = source
        self.dtype = evaluation.dtype_of(cfg) if cfg is not None else None
        self.tokenizer = tokenizer_of(source)
        self.base, self.notes = evaluation.base_to_compare(cfg, options)
        self.base &= source.run is not None or source.adapter is not None
        self.groups, self.scores, self.classes = None, None, None
        self.triplets: list[tuple[int, int, int]] = []
        folder = Path(options.data[0]).expanduser() if options.data and len(options.data) == 1 else None
        if folder is not None and (folder / "corpus.jsonl").is_file():
            options.refuse(("columns", "group_by", "rows"), "a corpus in BEIR's layout")
            self._corpus(retrieval.read_beir(folder), str(folder))
        elif cfg is None:
            raise UserError(
                "a model alone is measured on a corpus in BEIR's layout: give --data=DIR, or measure a run on rows."
            )
        else:
            self._rows(cfg, options)
        self.tokens = sum(map(len, self.texts))

    def _corpus(self, task: retrieval.Task, name: str) -> None:
        pooled = pooled_of(self.source)
        prompts = pooled.prompts if pooled else {}
        embedder = Embedder(*open_shape(self.source), self.tokenizer)
        asked = embedder.tokens(task.queries, prompts.get("query", ""))
        self.texts = [*asked, *embedder.tokens(task.documents, prompts.get("document", ""))]
        self.queries = np.arange(len(asked))
        self.documents = len(asked) + np.arange(len(task.documents))
        self.relevant, self.own, self.where = task.relevant, task.own, task.where
        self.names = [name]
        self.lines = [f"{name}: {len(asked):,} queries, {len(task.documents):,} documents"]

    def _rows(self, cfg: Any, options: Options) -> None:
        from jaxtune.config.recipe import experiment

        of_run = experiment(cfg, weights=False)
        form = of_run.task.form
        if options.columns is not None:
            form.columns = dict(options.columns)
        _, sources, fraction = evaluation.sources(self.source, cfg, options)
        rows, self.lines = tokenised(
            self.tokenizer,
            sources,
            options.rows,
            eval_fraction=fraction,
            labels=form,
            max_length=of_run.recipe.batch.length,
            overlength=of_run.data.overlength,
            vocab_size=of_run.module.spec.vocab,
            cache=of_run.data.cache,
        )
        self.names = data_names(sources)
        self.groups = group_values(rows, self.names, options.group_by) if options.group_by else None
        self.where = [rows.where(i) for i in range(len(rows))]
        numbers: dict[bytes, int] = {}
        self.texts: list[list[int]] = []

        def number(ids):
            if ids.tobytes() not in numbers:
                numbers[ids.tobytes()] = len(self.texts)
                self.texts.append(ids.tolist())
            return numbers[ids.tobytes()]

        each = [[number(ids) for ids in texts_of(rows, i)] for i in range(len(rows))]
        self.queries = np.array([texts[0] for texts in each])
        self.own = np.full(len(rows), -1, np.int64)
        if form.reads.label in (SCORE, BINARY):
            self.scores, self.pairs = rows.target[:, 0], np.array([texts[:2] for texts in each])
            self.documents, self.relevant = np.zeros(0, np.int64), []
            return
        if form.reads.label == CLASS:
            self.documents, self.own = self.queries, np.arange(len(rows))
            self.classes = np.unique(rows.target, axis=0, return_inverse=True)[1].reshape(-1)
            members: dict[tuple, list[int]] = {}
            for i, label in enumerate(map(tuple, rows.target.tolist())):
                members.setdefault(label, []).append(i)
            same = [members[label] for label in map(tuple, rows.target.tolist())]
            self.relevant = [{j: 1.0 for j in group if j != i} for i, group in enumerate(same)]
            return
        self.documents = np.unique([text for texts in each for text in texts[1:]])
        place = {int(text): i for i, text in enumerate(self.documents)}
        answers: dict[int, dict[int, float]] = {}
        for texts in each:
            answers.setdefault(texts[0], {})[place[texts[1]]] = 1.0
        self.relevant = [answers[texts[0]] for texts in each]
        self.own = np.array([place.get(texts[0], -1) for texts in each])
        self.triplets = [(i, texts[1], texts[k]) for i, texts in enumerate(each) for k in range(2, len(texts))]

    def systems(self) -> Iterator[System]:
        for name, base in (("base", True), ("tuned", False)) if self.base else (("tuned", False),):
            embedder = open_embedder(self.source, base=base, dtype=self.dtype)
            yield System(name, embedder, None, "")

    def measure(self, system: System, kept: Kept, progress: Progress) -> np.ndarray:
        """The vectors of all texts, of length 1, f32[texts, D]."""
        done = progress(f"{system.name}: vectors", len(self.texts))
        found = system.module.vectors_of(self.texts, done=done)
        return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)

    def columns(self, measured: Mapping[str, np.ndarray]) -> dict[str, Column]:
        if self.scores is not None:
            return self._correlations(measured)
        self.rankings = {
            who: retrieval.rank(x[self.queries], x[self.documents], self.own) for who, x in measured.items()
        }
        at = np.array([i for i, found in enumerate(self.relevant) if found], np.int64)
        if not len(at):
            raise UserError(f"No row of {', '.join(self.names)} has anything to find: every class has one text.")
        each = {
            who: [retrieval.measures(ranks[i], self.relevant[i]) for i in at] for who, ranks in self.rankings.items()
        }
        names = next(iter(each.values()))[0]
        columns = {
            name: _column(name, {who: np.array([row[name] for row in rows]) for who, rows in each.items()}, at)
            for name in names
        }
        if self.classes is not None:
            columns |= self._of_classes({who: x[self.queries[at]] for who, x in measured.items()}, at)
        if self.triplets:
            of = np.array([i for i, _, _ in self.triplets])
            right = {}
            for who, x in measured.items():
                near, far = ((x[self.queries[of]] * x[[t[k] for t in self.triplets]]).sum(-1) for k in (1, 2))
                each_row = 0.5 * (np.sign(near - far) + 1)
                right[who] = np.stack([np.bincount(of, each_row), np.bincount(of)], 1)
            rows = np.flatnonzero(np.bincount(of))
            columns["triplets"] = _column("triplets", {who: v[rows] for who, v in right.items()}, rows)
        return columns

    def _of_classes(self, vectors: Mapping[str, np.ndarray], at: np.ndarray) -> dict[str, Column]:
        """What the vectors of each row tell of its class."""
        own = np.unique(self.classes[at], return_inverse=True)[1]
        if len(own) < 2 * clusters.FOLDS or own.max() == 0:
            return {}
        grouped = {
            who: np.stack([own, clusters.clusters(x, own.max() + 1)], 1).astype(float) for who, x in vectors.items()
        }
        right = {who: (clusters.probe(x, own) == own).astype(float) for who, x in vectors.items()}
        return {
            "v_measure": Column(*KNOWN["v_measure"], statistics.each(clusters.v_measure), grouped, at),
            "probe": _column("probe", right, at),
        }

    def _correlations(self, measured: Mapping[str, np.ndarray]) -> dict[str, Column]:
        from scipy.stats import rankdata

        at = np.arange(len(self.scores))
        self.cosines = {who: (x[self.pairs[:, 0]] * x[self.pairs[:, 1]]).sum(-1) for who, x in measured.items()}
        both = {who: np.stack([found, self.scores], 1) for who, found in self.cosines.items()}

        def pearson(draw):
            a, b = draw.T
            with np.errstate(invalid="ignore", divide="ignore"):
                return float(np.nan_to_num(np.corrcoef(a, b)[0, 1]))

        def spearman(draw):
            return pearson(np.stack([rankdata(x) for x in draw.T], 1))

        return {
            name: Column(*KNOWN[name], statistics.each(score), both, at)
            for name, score in (("spearman", spearman), ("pearson", pearson))
        }

    def records(self, measured: Mapping[str, np.ndarray], found: Mapping[str, Column]) -> Iterable[dict[str, Any]]:
        def text(i):
            return self.tokenizer.decode(self.texts[int(i)], skip_special_tokens=True)

        for i, where in enumerate(self.where):
            record = {"where": where, "prompt": text(self.queries[i])}
            if self.scores is not None:
                record["beside"] = {f"score {self.scores[i]:g}": text(self.pairs[i, 1])}
                answers = {who: {"answer": f"{x[i]:.3f}", "cosine": float(x[i])} for who, x in self.cosines.items()}
            else:
                relevant = list(self.relevant[i])[:NEIGHBOURS]
                record["beside"] = {"relevant": "\n".join(text(self.documents[j]) for j in relevant)}
                answers = {who: self._nearest(ranks[i], self.relevant[i], text) for who, ranks in self.rankings.items()}
            if self.groups is not None:
                record["group"] = self.groups[i]
            yield record | answers

    def _nearest(self, ranking: np.ndarray, relevant: Mapping[int, float], text: Any) -> dict[str, Any]:
        shown = [f"{'✓' if int(j) in relevant else '·'} {text(self.documents[j])}" for j in ranking[:NEIGHBOURS]]
        return {"answer": "\n".join(shown)} | (retrieval.measures(ranking, relevant) if relevant else {})

    def confusion(self, measured: Mapping[str, np.ndarray]) -> None:
        return None


def _column(name: str, values: dict[str, np.ndarray], at: np.ndarray) -> Column:
    return Column(*KNOWN[name], statistics.mean, values, at)


def open_shape(source: Tuned) -> tuple[Any, None, Any]:
    """A source's module, without parameters, and its pooling: what decides how texts are cut."""
    from jaxtune import models
    from jaxtune.hf.load import read_config
    from jaxtune.hf.vectors import Pooled

    module = models.build(read_config(source.model))
    return module, None, pooled_of(source) or Pooled("mean")
