"""A run in plain values: its recipe, base, data, evaluations and checkpoints. Made by `config.recipe`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune import data
from jaxtune.curate import NOTE, DataReport, glance
from jaxtune.data import canaries
from jaxtune.data.batches import GRAIN
from jaxtune.errors import printable
from jaxtune.hf import load as hf
from jaxtune.hf.digest import BaseFiles
from jaxtune.hf.stops import added_line
from jaxtune.methods.vocabulary import resize, with_rows
from jaxtune.run import general, watched
from jaxtune.train import watch
from jaxtune.train.parallel import shardings
from jaxtune.train.recipe import Recipe


@dataclass(frozen=True)
class Base:
    """The pretrained model, as the config names it.

    Attributes:
        path: a directory or hub id, as given.
        folder: its directory.
        init: "pretrained", or "random": only its config and tokenizer are read.
        tokenizer: directory or hub id of the tokenizer.
        chat_template: a Jinja file; None: the tokenizer's own.
        new_tokens: that are added to the tokenizer.
    """

    path: str
    folder: Path
    init: str
    tokenizer: str
    chat_template: str | None
    new_tokens: tuple[str, ...] = ()

    @cached_property
    def files(self) -> BaseFiles:
        """Hashes of its files."""
        return BaseFiles(self.folder, hf.resolve(self.tokenizer), weights=self.init == "pretrained")

    def load(self, recipe: Recipe, mesh: Any = None) -> Any:
        """Read the recipe's base parameters, or initialise them at random; table rows beyond the file's are new.

        Args:
            recipe: the run's.
            mesh: of devices; each is given what it holds of the weights, as they are read. None: all lie on the first.
        """
        key = jax.random.key(recipe.seed)
        lay = None if mesh is None or mesh.size == 1 else partial(shardings, mesh=mesh)
        if self.init == "random":
            where = lay and lay(recipe.module.abstract_params())
            return recipe.quantized(jax.jit(recipe.module.init_params, out_shardings=where)(key))
        self.files.begin()
        kind = None if recipe.quantization == "none" else recipe.quantization
        new = getattr(recipe.module.spec, "new_tokens", 0)
        module = with_rows(recipe.module, recipe.module.spec.vocab - new) if new else recipe.module
        params = hf.read_params(module, self.folder, key=key, quantization=kind, lay=lay)
        return resize(module, params, recipe.module.spec.vocab)[1] if new else params


@dataclass(frozen=True, eq=False)
class Experiment:
    """One run, before anything is loaded.

    Attributes:
        recipe: the step.
        base: the model that is tuned.
        method, settings: the tuning method's name, and its own section of the config.
        adapter: its result is an adapter, not a whole model.
        optimizer, lr: the optimizer's name, and the peak learning rate.
        default_lr: method -> its default rate.
        prefix: virtual tokens before each row, within `recipe.batch.length`.
        data, train, mesh, log, evaluate: the sections of the config, by attribute.
        text: the whole config as JSON.
    """

    recipe: Recipe
    base: Base
    method: str
    settings: Mapping[str, Any]
    adapter: bool
    optimizer: str
    lr: float
    default_lr: Mapping[str, float]
    prefix: Sequence[int]
    data: Any
    train: Any
    mesh: Any
    log: Any
    evaluate: Any
    text: str

    @property
    def module(self) -> Any:
        return self.recipe.module

    @property
    def task(self) -> Any:
        return self.recipe.task

    def in_steps(self, steps: int) -> "Experiment":
        """The same experiment with the number of steps set."""
        return replace(self, recipe=replace(self.recipe, steps=steps))

    def rate_hint(self) -> list[watch.RunFinding]:
        """Findings on the learning rate before the run."""
        if self.optimizer != "adamw" or self.base.init == "random":  # an untrained model takes other rates
            return []
        scale = self.settings["lora_alpha"] / self.settings["r"] if "lora_alpha" in self.settings else 1.0
        return watch.rate_hint(self.lr, self.method, self.default_lr, width=self.module.spec.width, scale=scale)


@dataclass
class Data:
    """The rows of a run, tokenised.

    Attributes:
        train: of each source; with data.streaming its first block, for what looks at rows before training.
        eval: held out; None: there are none.
        report: what was read and left out.
        length: the most tokens of a row, with the virtual tokens before it.
        general: text outside the training data, as evaluate.general names it; None: there is none.
        known: questions by what the base knew, as evaluate.known names them; None: there are none.
        told_apart: the rows of evaluate.memory; None: it is 0.
        notes: what became of these.
        streamed: with data.streaming, the rows of each source on disk.
    """

    tokenizer: Any
    train: list[data.Rows]
    eval: data.Rows | None
    report: data.Report
    length: int
    prefix: Sequence[int] = ()
    form: data.LabelForm | None = None
    general: data.Rows | None = None
    known: watched.Known | None = None
    told_apart: watched.Sides | None = None
    notes: Sequence[str] = ()
    streamed: Sequence[data.Streamed] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest training row, with the virtual tokens before it."""
        found = [int(part.length.max()) for part in self.train] if self.streamed is None else []
        return max([*found, *(part.longest for part in self.streamed or ())]) + len(self.prefix)

    @property
    def ends(self) -> list[int]:
        """The tokens that end trained turns or texts."""
        return sorted(token for token in self.report.ends if token >= 0)

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens at which a generated text ends: these, and the tokenizer's own."""
        own = self.tokenizer.eos_token_id
        return tuple(sorted({*self.ends, *([] if own is None else [own])}))

    @cached_property
    def glance(self) -> DataReport:
        """Findings on the rows, from their tokens."""
        train = [canaries.without(rows) for rows in self.train]
        return glance(self.tokenizer, train, self.eval, self.report, self.form)

    @property
    def sets(self) -> list[Sequence[data.Rows]]:
        """Training and held-out rows, each as its sources."""
        return [self.train] if self.eval is None else [self.train, [self.eval]]


def open_data(experiment: Experiment) -> Data:
    """Read and tokenise the rows that the config names."""
    d, length, prefix = experiment.data, experiment.recipe.batch.length, experiment.prefix
    base = experiment.base
    tokenizer = data.load_tokenizer(base.tokenizer, base.chat_template, d.date, base.new_tokens)
    train, held_out, report = data.prepare(
        tokenizer,
        d.train,
        eval=d.eval,
        eval_fraction=d.eval_fraction,
        **data.reading(d),
        labels=experiment.task.form,
        max_length=length - len(prefix),
        overlength=d.overlength,
        vocab_size=experiment.module.spec.vocab,
        cache=d.cache,
        streaming=d.streaming,
    )
    rows_on_disk = train if d.streaming else None
    if rows_on_disk is not None:
        train = [part.block(int(np.argmax(part.kept > 0))) for part in train]
    text, notes = general.read(experiment, tokenizer, train)
    known, told = watched.read_known(experiment, tokenizer, train)
    apart, more = watched.read_sides(experiment, tokenizer, train, held_out)
    notes += [*told, *more]
    if d.canaries:
        secret = canaries.rows(tokenizer, d.canaries, length - len(prefix))
        notes.append(f"data.canaries: {len(secret):,} rows with made-up secrets are among the training rows.")
        train = [data.Rows.concatenate([train[0], secret]), *train[1:]] if len(secret) else train
    if rows_on_disk is not None:
        seen, every = sum(map(len, train)), sum(map(len, rows_on_disk))
        notes.append(
            f"data.streaming: {every:,} rows lie on disk, shuffled by block. Findings on rows, and on what they "
            f"share with other data, are of the first {seen:,}."
        )
    form = experiment.task.form
    return Data(tokenizer, train, held_out, report, length, prefix, form, text, known, apart, notes, rows_on_disk)


def data_lines(experiment: Experiment, rows: Data) -> list[str]:
    """Lines on what was read and how it is trained."""
    lines = [*rows.report.lines(), *rows.notes]
    if experiment.data.max_length is None:
        known = experiment.module.spec.positions
        lines.append(f"data.max_length is {rows.length} by default (the model knows {known}).")
    lines += [] if rows.form is None else rows.form.said(rows.train)
    lines += added_line(rows.tokenizer, experiment.base.folder, rows.ends)
    lines += [
        f"{f.severity}: {f.message}: {f.fix}."
        for f in rows.glance.findings
        if f.severity != NOTE or f.check == "labels"
    ]
    return [printable(line) for line in lines]


def make_batches(
    experiment: Experiment, rows: Data, *, grain: int = GRAIN, parts: int = 1
) -> tuple[data.Batches, data.EvalBatches | None, int]:
    """Return the training stream, the evaluation batches and the number of steps; `parts` devices share the rows."""
    d, t = experiment.data, experiment.train
    shared = {
        "grain": grain,
        "batch_size": t.batch_size,
        "grad_accum": t.grad_accum,
        "max_length": rows.length,
        "packing": d.packing,
        "max_segments": d.max_segments,
        "assembler": experiment.task.assembler,
        "parts": parts,
    }
    train = [part.prefixed(rows.prefix) for part in rows.streamed or rows.train]
    if rows.streamed:
        batches = data.StreamedBatches(train, weights=d.weights, seed=t.seed, **shared)
    else:
        batches = data.Batches(train, weights=d.weights, seed=t.seed, group_by_length=d.group_by_length, **shared)
    held_out = None if rows.eval is None else data.EvalBatches(rows.eval.prefixed(rows.prefix), **shared)
    return batches, held_out, t.steps or batches.steps(t.epochs)


def one_order(experiments: Sequence[Experiment]) -> bool:
    """Whether all see the same batches."""
    return len({e.train.seed for e in experiments}) == 1 and experiments[0].task.draws is None


def batch_at(streams: Sequence[data.Batches], shared: bool = True) -> Callable[[int], Any]:
    """Return the batch of a step: one for all, or for each member its own."""
    return streams[0].batch if shared else data.side_by_side(streams)
