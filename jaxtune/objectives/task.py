"""Tasks. A task is a loss, the form of its rows and batches, and the metrics of its evaluations.

`TASKS` lists them; `objective.name` chooses one. To add a task, call `register` with a function that
makes it for a model; no other code needs its name:

    def open_pairs(given: TaskInput): ... return module, Task(loss=..., ...)
    register("pairs", open_pairs)

Nothing here imports jax before a task is opened.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from jaxtune.errors import UserError

DEFAULT_LENGTH = 1024  # of data.max_length, where the model's own limit is higher


class TaskInput(NamedTuple):
    """What a task is opened on.

    Attributes:
        config: the model's config.json.
        fields: of its module, such as dtype and remat.
        objective, data: the sections of the run's config.
        tokenizer: directory of the tokenizer.
        folder: directory of the model, or of the adapter on it that says how vectors are made; None: there is none.
    """

    config: Mapping[str, Any]
    fields: Mapping[str, Any]
    objective: Mapping[str, Any]
    data: Mapping[str, Any]
    tokenizer: str
    folder: Any = None

    def length(self, module: Any, default: int | None = None) -> int:
        """The most tokens of a row; see `row_length`."""
        return row_length(self.data["max_length"], module, default)


def row_length(asked: int | None, module: Any, default: int | None = None) -> int:
    """Return the most tokens of a row: data.max_length, by default `default` (1024) or the module's positions,
    whichever is less.

    Raises:
        UserError: it exceeds them.
    """
    known = module.spec.positions
    if asked is None:
        return min(known, default or DEFAULT_LENGTH)
    if asked > known:
        raise UserError(f"data.max_length={asked} exceeds the {known} positions that the model knows; lower it.")
    return asked


Opener = Callable[[TaskInput], tuple[Any, "Task"]]


class BatchShape(NamedTuple):
    """The shape of a step's batch: `micros` micro-batches of `rows` rows of `length` tokens; packed: several texts."""

    rows: int
    length: int
    micros: int = 1
    packed: bool = False


class Draws(NamedTuple):
    """Answers that the model in training writes itself, in steps of its own (on-policy).

    Attributes:
        share: of a step's rows.
        every: in every so many-th step.
        max_new_tokens: of an answer.
        temperature: at which its tokens are drawn.
    """

    share: float
    every: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0


@dataclass(frozen=True)
class Task:
    """The interface of a task.

    Attributes:
        loss: (module, members that share the step) -> loss_fn; see `jaxtune.objectives`. The module may be what lies
            above a cut of the task's own (`jaxtune.train.features`).
        batch_like: BatchShape -> the abstract batch of a step, [A, B, ...] each.
        metrics: (loss, weight, summed aux values of the loss) -> metrics that an evaluation logs beside eval/loss.
        assembler: lays data rows into batches (`jaxtune.data.batches.Assembler`).
        form: how labelled rows are read; None: rows are text (`jaxtune.data.formats`).
        chunk: (tokens, members, backend) -> tokens whose logits exist at once; None: logits are kept like activations.
        continues: whether the result continues text, so that `jaxtune generate` and samples apply.
        features: whether its batches may hold features in place of tokens (`jaxtune.train.features`).
        companion: another model that the loss reads: it is then given `tree.Beside(params, companion's)`; None: none.
        once: (the base's parameters, store, mesh) -> what is computed of each row once, before the first step, and lies
            in batches beside its tokens; None: nothing is.
        values: what the loss is told, by name: an array each in the state, params["objective"], so that a sweep of it
            is one compiled step.
        length: the default of data.max_length; None: that of all tasks.
        result: what is written beside the model or the adapter that a run ends with: `.write(folder, width)` of it.
        reference: the loss compares with the model as the run begins: "precomputed": batches hold the log-probabilities
            of their texts under it (`jaxtune.train.reference`); "live": the loss computes them from the base under the
            adapters; None: it does not.
        others: what else it depends on: a setting -> a hash of the files that it names, the same when a run is resumed.
        layers: seed -> parameters of the task's own, which stand in the tree beside the module's and are trained by
            every method; None: it has none.
        draws: rows of the training batches are answered by the model itself (`jaxtune.run.drawing`); None: none are.
    """

    loss: Callable[[Any, int], Callable[..., Any]]
    batch_like: Callable[[BatchShape], dict[str, Any]]
    metrics: Callable[[float, float, Any], dict[str, float]]
    assembler: type
    form: Any = None
    chunk: Callable[[int, int, str | None], int] | None = None
    continues: bool = False
    features: bool = True
    companion: "Companion | None" = None
    once: Callable[[Any, Any, Any], Any] | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    reference: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)
    draws: Draws | None = None
    layers: Callable[[int], dict[str, Any]] | None = None
    length: int | None = None
    result: Any = None


class Companion(Protocol):
    """Another model's parameters, frozen, in a step: as abstract arrays, and read."""

    def abstract(self) -> Any: ...

    def load(self) -> Any: ...


class Entry(NamedTuple):
    """A row of `TASKS`.

    Attributes:
        opener: a function that makes the task for a model, or its location, "module:name".
        settings: of the settings that only some tasks read, those that this one reads; the others are refused.
        auto_class: the class of transformers that loads the result.
        evaluator: how `jaxtune eval` measures held-out rows, "module:name" (`jaxtune.evaluate.evaluation.Evaluator`).
        recognises: "module:name" of a function (source, first row, settings given) -> (form, a sentence for the user)
            of rows that are this task's by their columns; or None, for others (`jaxtune init`).
        in_step: those of its settings that are `Task.values`, which members of one compiled step may differ in.
        rate: the default learning rate, as a share of the method's. Losses over answers, which reward every further
            step away from the base, take a tenth, as is usual.
    """

    opener: Opener | str
    settings: tuple[str, ...] = ()
    auto_class: str = "AutoModelForCausalLM"
    evaluator: str = "jaxtune.evaluate.own_loss:OwnLoss"
    recognises: str | None = None
    in_step: tuple[str, ...] = ()
    rate: float = 1.0


_ANSWERS = tuple(f"evaluate.{name}" for name in ("samples", "prompts", "metrics", "max_new_tokens", "rows"))
_TURNS = (
    *("data.system", "data.system_as_user", "data.roles", "data.allow_left_out", "data.ignore", "model.chat_template"),
    *(*_ANSWERS, "evaluate.general", "evaluate.known", "evaluate.memory"),
)
_TEXT = (
    *("data.format", "data.template", "data.completion_from", "data.prompt_from", "data.packing"),
    *("data.max_segments", "data.canaries", "evaluate.canaries"),
    *_TURNS,
)
_PAIR_VALUES = ("objective.beta", "objective.gamma", "objective.label_smoothing")
_KTO_VALUES = ("objective.beta", "objective.desirable_weight", "objective.undesirable_weight")
_CONTRAST_VALUES = ("objective.temperature", "objective.margin")
_LABELS = ("data.packing", "objective.labels", "objective.first_label", "objective.class_weights")

TASKS: dict[str, Entry] = {
    "causal_lm": Entry(
        "jaxtune.objectives.causal_lm:open_task",
        (*_TEXT, "objective.z_loss"),
        evaluator="jaxtune.evaluate.answers:Answers",
    ),
    "seq2seq": Entry(
        "jaxtune.objectives.seq2seq:open_task",
        (*("data.format", "data.template", "data.ignore", "data.max_target_length", "objective.z_loss"), *_ANSWERS),
        "AutoModelForSeq2SeqLM",
        "jaxtune.evaluate.answers:Answers",
    ),
    "distillation": Entry(
        "jaxtune.objectives.distillation:open_task",
        (
            *(*_TEXT, "objective.teacher", "objective.top_k", "objective.divergence", "objective.jsd_beta"),
            *("objective.temperature", "objective.ce_weight"),
            *("objective.lmbda", "objective.draw_every", "objective.max_new_tokens"),
        ),
        evaluator="jaxtune.evaluate.answers:Answers",
    ),
    "sequence_classification": Entry(
        "jaxtune.objectives.labels:open_sequence",
        (*_LABELS, "objective.problem_type", "objective.pooling"),
        "AutoModelForSequenceClassification",
        "jaxtune.evaluate.classifiers:Classes",
    ),
    "token_classification": Entry(
        "jaxtune.objectives.labels:open_token",
        _LABELS,
        "AutoModelForTokenClassification",
        "jaxtune.evaluate.classifiers:Classes",
    ),
    "preference": Entry(
        "jaxtune.objectives.preference:open_preference",
        (
            *("objective.loss", "objective.loss_weights", "objective.sft_weight", "objective.reference"),
            *("objective.share_prompt", "data.packing"),
            *(*_PAIR_VALUES, *_TURNS),
        ),
        evaluator="jaxtune.evaluate.preferences:Preferences",
        in_step=_PAIR_VALUES,
        rate=0.1,
    ),
    "kto": Entry(
        "jaxtune.objectives.preference:open_kto",
        ("objective.reference", "data.packing", *_KTO_VALUES, *_TURNS),
        evaluator="jaxtune.evaluate.preferences:Preferences",
        in_step=_KTO_VALUES,
        rate=0.1,
    ),
    "reward": Entry(
        "jaxtune.objectives.reward:open_task",
        ("objective.centering", *(name for name in _TURNS if not name.startswith("evaluate."))),
        "AutoModelForSequenceClassification",
    ),
    "embedding": Entry(
        "jaxtune.objectives.embedding:open_task",
        (
            *("objective.contrast", "objective.pooling", "objective.normalize", "objective.matryoshka"),
            *("objective.dense", "objective.adaptive_layers"),
            *("objective.query_prefix", "objective.document_prefix", "objective.symmetric", "data.ignore"),
            "data.packing",
            *_CONTRAST_VALUES,
        ),
        "AutoModel",
        "jaxtune.evaluate.vectors:Vectors",
        recognises="jaxtune.data.embeddings:recognised",
        in_step=_CONTRAST_VALUES,
    ),
    "reranking": Entry(
        "jaxtune.objectives.reranking:open_task",
        ("objective.ranking", "data.ignore", "data.packing"),
        "AutoModelForSequenceClassification",
    ),
}
OBJECTIVE = "objective"  # where `Task.values` stand in the tree of parameters


def register(
    name: str,
    opener: Opener | str,
    settings: Sequence[str] = (),
    auto_class: str = "AutoModelForCausalLM",
    evaluator: str = Entry._field_defaults["evaluator"],
    in_step: Sequence[str] = (),
    recognises: str | None = None,
) -> None:
    """Add a task to those that `objective.name` chooses from.

    Args:
        name: its name in configs.
        opener: `(TaskInput) -> (module, Task)`, or "module:name" of it.
        settings: of the settings that only some tasks read, those that this one reads.
        auto_class: the class of transformers that loads the result.
        evaluator: how `jaxtune eval` measures held-out rows; default: the task's own loss and metrics, row by row.
        in_step: those of its settings that its `Task.values` hold.
        recognises: how `jaxtune init` knows its rows.

    Raises:
        ValueError: there is a task of this name.
    """
    if name in TASKS:
        raise ValueError(f"there is a task called {name!r} already")
    TASKS[name] = Entry(opener, tuple(settings), auto_class, evaluator, recognises, tuple(in_step))


def open_task(name: str, given: TaskInput) -> tuple[Any, Task]:
    """Open the task called `name` on a model: (module, task).

    Raises:
        UserError: the model does not fit the task, or the data lacks something that the task needs.
    """
    opener = TASKS[name].opener
    return (located(opener) if isinstance(opener, str) else opener)(given)


def located(location: str) -> Any:
    """What stands at "module:name"."""
    module, _, name = location.partition(":")
    return getattr(importlib.import_module(module), name)


def unread(name: str) -> tuple[str, ...]:
    """Return the settings (or sections) that some task reads, but the task called `name` does not."""
    mine = TASKS[name].settings
    return tuple(dict.fromkeys(path for entry in TASKS.values() for path in entry.settings if path not in mine))


def of_model(config: Mapping[str, Any], task_type: str | None = None) -> str:
    """Return the name of the task that a model was made for, from its config.

    Args:
        config: the model's config.json.
        task_type: of a PEFT adapter on it.
    """
    from jaxtune.models.classifier import TASK_TYPES, read_labels

    if task_type == "SEQ_2_SEQ_LM" or (task_type is None and config.get("is_encoder_decoder")):
        return "seq2seq"
    labels = read_labels(config)
    kind = labels and labels.kind
    if task_type is not None:
        kind = next((kind for kind, theirs in TASK_TYPES.items() if theirs == task_type), None)
    return next((name for name, entry in TASKS.items() if entry.auto_class == f"AutoModelFor{kind}"), "causal_lm")
