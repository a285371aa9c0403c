"""The tasks that `objective.name` chooses from: what each trains, reads, minimises and measures.

A new task is a loss, a form of its rows, and an entry in TASKS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtune import data, models
from jaxtune.data.batches import Assembler
from jaxtune.data.labels import JOINED, LabelAssembler, LabelForm, count_ids, count_labels
from jaxtune.errors import UserError
from jaxtune.methods.table import cut
from jaxtune.models.classifier import PROBLEMS, SEQUENCE, TOKEN, Labels, read_labels, with_labels
from jaxtune.models.decoder import Decoder
from jaxtune.objectives.causal_lm import causal_lm
from jaxtune.objectives.classification import classification, metrics
from jaxtune.train import loop

REGRESSION = PROBLEMS[2]


@dataclass
class Task:
    """What a job asks of its task.

    Attributes:
        module: the model.
        loss: (the module or what of it lies above a cut, config, runs that share the step) -> loss_fn; see
            `objectives`.
        metrics: (loss, weight, sums of what the loss counts) -> what an evaluation logs.
        form: how labelled rows are read; None: text to be continued.
        assembler: lays rows into batches.
    """

    module: Any
    loss: Callable[[Any, Any, int], Callable[..., Any]]
    metrics: Callable[[float, float, Any], dict[str, float]]
    form: LabelForm | None = None
    assembler: type[Assembler] = Assembler


def open_task(cfg: Any, config: Mapping[str, Any], **settings: Any) -> Task:
    """The task of a config on the model of an HF config.json; `settings` are fields of the module.

    Raises:
        UserError: the model does not fit the task, or the labels are missing, unknown or only one.
    """
    return TASKS[cfg.objective.name](cfg, config, settings)


def _causal_lm(cfg: Any, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Task:
    module = models.build(dict(config), **settings)
    if not isinstance(module, Decoder):
        what = (
            "has a label head" if hasattr(module, "labels") else f"(model_type={config['model_type']!r}) is an encoder"
        )
        raise UserError(
            f"objective.name=causal_lm needs a model that continues text, and the one in model.path {what}: set "
            "objective.name to sequence_classification or token_classification."
        )
    module = cut(cfg.tune.method, module, cfg.tune.get(cfg.tune.method, None) or {})

    def loss(module, cfg, lanes):
        return causal_lm(module, packed=cfg.data.packing, z_loss=cfg.objective.z_loss, members=lanes)

    return Task(module, loss, loop.language_metrics)


def _classification(kind: str, cfg: Any, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Task:
    o, stored = cfg.objective, read_labels(config)
    if stored is not None and stored.kind != kind:
        stored = None
    problem = o.problem_type if o.problem_type != "auto" else stored.problem if stored else PROBLEMS[0]
    form = LabelForm(
        per_token=kind == TOKEN,
        several=problem == PROBLEMS[1],
        value=problem == REGRESSION,
        columns=dict(cfg.data.columns),
        first=o.first_label,
    )
    names, origin = o.labels, "objective.labels"
    if problem == REGRESSION:
        names = stored.names if stored and stored.problem == REGRESSION else ("LABEL_0",)
        if len(names) != 1:
            raise UserError(f"The model in model.path predicts {len(names)} values; a regression here has one.")
    elif not names and stored and stored.problem == problem:
        names, origin = stored.names, "the model's config.json"
    if not names:
        counted = count_labels(map(data.read, cfg.data.train), form)
        names, origin = counted.names, "data.train"
        form.notes += counted.notes
    if len(names) < 2 and problem != REGRESSION:
        raise UserError(f"{origin} has only the label {names[0]!r}; at least two are needed to learn from.")
    form.names, form.origin = names, origin
    counted = count_ids(map(data.read, cfg.data.train), form) if o.class_weights == "balanced" else None
    labels = Labels(
        kind,
        names,
        problem,
        o.pooling if o.pooling != "auto" else stored and stored.pooling,
        drawn=not (stored and (stored.names, stored.problem) == (names, problem)),
    )
    config = {**config, "architectures": None}
    if config.get("pad_token_id") is None:  # transformers needs it, to find the last token of a decoder's row
        tokenizer = data.load_tokenizer(cfg.model.tokenizer)
        config |= {} if tokenizer.pad_token_id is None else {"pad_token_id": tokenizer.pad_token_id}
    module = with_labels(models.build(config, **settings), labels)
    form.joined = None if module.is_encoder else JOINED
    module = cut(cfg.tune.method, module, cfg.tune.get(cfg.tune.method, None) or {})
    weights = _class_weights(o.class_weights, form, counted)

    def loss(module, cfg, lanes):
        return classification(module, weights)

    return Task(module, loss, lambda loss, weight, aux: metrics(aux), form, LabelAssembler)


def _class_weights(asked: Any, form: LabelForm, counted: Any) -> tuple[float, ...] | None:
    """The weight of each label: as scikit-learn balances classes, or of several labels the ratio of no to yes."""
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


TASKS: dict[str, Callable[..., Task]] = {
    "causal_lm": _causal_lm,
    "sequence_classification": partial(_classification, SEQUENCE),
    "token_classification": partial(_classification, TOKEN),
}
