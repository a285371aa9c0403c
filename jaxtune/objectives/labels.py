"""The tasks with labels, sequence_classification and token_classification: their rows, batches and metrics."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import models
from jaxtune.data import load_tokenizer, read
from jaxtune.data.label_counts import count_ids, count_labels
from jaxtune.data.label_rows import LabelAssembler
from jaxtune.data.labels import JOINED, LabelForm
from jaxtune.errors import UserError
from jaxtune.models.classifier import PROBLEMS, SEQUENCE, TOKEN, Labels, read_labels, with_labels
from jaxtune.objectives.classification import classification, metrics
from jaxtune.objectives.task import BatchShape, Task, TaskInput

REGRESSION = PROBLEMS[2]


def _open(kind: str, given: TaskInput) -> tuple[Any, Task]:
    """Put a label head on a model.

    Raises:
        UserError: the labels are missing, unknown or only one.
    """
    objective, data = given.objective, given.data
    stored = read_labels(given.config)
    if stored is not None and stored.kind != kind:
        stored = None
    problem = objective["problem_type"]
    if problem == "auto":
        problem = stored.problem if stored else PROBLEMS[0]
    form = LabelForm(
        per_token=kind == TOKEN,
        several=problem == PROBLEMS[1],
        value=problem == REGRESSION,
        columns=dict(data["columns"]),
        first=objective["first_label"],
    )
    names, origin = objective["labels"], "objective.labels"
    if problem == REGRESSION:
        names = stored.names if stored and stored.problem == REGRESSION else ("LABEL_0",)
        if len(names) != 1:
            raise UserError(f"The model in model.path predicts {len(names)} values; a regression here has one.")
    elif not names and stored and stored.problem == problem:
        names, origin = stored.names, "the model's config.json"
    if not names:
        counted = count_labels(map(read, data["train"]), form)
        names, origin = counted.names, "data.train"
        form.notes += counted.notes
    if len(names) < 2 and problem != REGRESSION:
        raise UserError(f"{origin} has only the label {names[0]!r}; at least two are needed to learn from.")
    form.names, form.origin = names, origin
    counted = count_ids(map(read, data["train"]), form) if objective["class_weights"] == "balanced" else None
    pooling = objective["pooling"]
    labels = Labels(
        kind,
        names,
        problem,
        pooling if pooling != "auto" else stored and stored.pooling,
        drawn=not (stored and (stored.names, stored.problem) == (names, problem)),
    )
    module = put_head(given, labels)
    form.joined = None if module.is_encoder else JOINED
    typed = module.is_encoder and module.spec.types > 1 and kind != TOKEN and _paired(form, data["train"])
    return module, label_task(module, form, _class_weights(objective["class_weights"], form, counted), typed)


def _paired(form: LabelForm, sources: Sequence[str]) -> bool:
    """Whether rows are pairs of texts, as far as the first ones say."""
    try:
        return any("text_pair" in form.theirs(read(name)) for name in sources or ())
    except UserError:  # reading all rows reports it
        return False


def put_head(given: TaskInput, labels: Labels, *, ends: bool = False) -> Any:
    """Put a label head on a model, whose config.json says how rows are padded.

    Args:
        given: the model and its tokenizer.
        labels: of the head.
        ends: rows end with the token that ends a text, which then cannot pad.
    """
    config = {**given.config, "architectures": None}
    padding, end = config.get("pad_token_id"), config.get("eos_token_id")
    ended = {*end} if isinstance(end, list) else {end}
    if padding is None or (ends and padding in ended):  # transformers finds the last token of a decoder's row by it
        known = load_tokenizer(given.tokenizer)
        ended |= {known.eos_token_id}
        others = (known.pad_token_id, *((known.unk_token_id, known.bos_token_id) if ends else ()))
        padding = next((i for i in others if i is not None and not (ends and i in ended)), padding)
        config |= {} if padding is None else {"pad_token_id": padding}
    return with_labels(models.build(config, **given.fields), labels)


def label_task(
    module: Any, form: LabelForm | None = None, class_weights: tuple[float, ...] | None = None, typed: bool = False
) -> Task:
    """Return the task of a `Classifier`; `class_weights` as for `classification`; typed: batches have token types."""
    return Task(
        loss=lambda module, members: classification(module, class_weights),
        batch_like=partial(_batch_like, module.labels, typed),
        metrics=lambda loss, weight, counts: metrics(counts),
        assembler=LabelAssembler,
        form=form,
    )


open_sequence, open_token = partial(_open, SEQUENCE), partial(_open, TOKEN)


def _batch_like(labels: Labels, typed: bool, shape: BatchShape) -> dict[str, jax.ShapeDtypeStruct]:
    rows = (shape.micros, shape.rows)
    tokens = jax.ShapeDtypeStruct((*rows, shape.length), jnp.int32)
    batch = {"tokens": tokens, "positions": tokens, "segments": tokens, "row": jax.ShapeDtypeStruct(rows, jnp.int32)}
    if labels.kind == TOKEN:
        return batch | {"targets": tokens, "weights": jax.ShapeDtypeStruct(tokens.shape, jnp.float32)}
    width = 1 if labels.problem == PROBLEMS[0] else len(labels.names)
    label = jax.ShapeDtypeStruct((*rows, width), jnp.float32)
    batch |= {"types": tokens} if typed else {}
    return batch | {"label": label, "weights": jax.ShapeDtypeStruct(rows, jnp.float32)}


def _class_weights(asked: Any, form: LabelForm, counted: Any) -> tuple[float, ...] | None:
    """The weight of each label: as scikit-learn balances classes; with several labels a row, negatives / positives."""
    if asked is None:
        return None
    if asked != "balanced":
        if len(asked) != len(form.names):
            raise UserError(
                f"objective.class_weights has {len(asked)} numbers for {len(form.names)} labels: "
                f"{', '.join(form.names[:12])}."
            )
        return asked
    counts = [counted.labels[name] for name in form.names]
    if 0 in counts:
        raise UserError(
            f"objective.class_weights=balanced: data.train has no row with the label {form.names[counts.index(0)]!r}; "
            "give the weights as numbers."
        )
    if form.several:
        return tuple((counted.rows - n) / n for n in counts)
    return tuple(sum(counts) / (len(counts) * n) for n in counts)
