"""Every setting of jaxtune once, and the way from a config file and the command line to a checked config.

    schema            the table SETTINGS: type, default, choices, range and one line of meaning
    load_file         runs `get_config()` of a config file, which returns overrides only; or reads a run's config.json
    resolve           merges defaults, file and command line, and names everything that is wrong in one message
    check_resume      says what may differ when a run goes on

Only this module and the command line (cli.py, commands/) know ConfigDict: below them, functions take plain arguments.
Nothing here imports jax, and ml_collections is imported when a config is resolved: `--help` needs neither.
"""

import inspect
import json
import math
import numbers
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtune.errors import UserError, nearest

if TYPE_CHECKING:
    from ml_collections import ConfigDict, FrozenConfigDict


# --------------------------------------------------------------------------------------------------- the schema


class Range(NamedTuple):
    """What values a setting takes, in words and as a predicate."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE = Range("above 0", lambda v: v > 0)
NOT_NEGATIVE = Range("0 or more", lambda v: v >= 0)
AT_LEAST_1 = Range("1 or more", lambda v: v >= 1)
AT_LEAST_2 = Range("2 or more", lambda v: v >= 2)
BELOW_1 = Range("0 or more and below 1", lambda v: 0 <= v < 1)
UP_TO_1 = Range("from 0 to 1", lambda v: 0 <= v <= 1)
SHARE_OR_STEPS = Range("a share below 1 or a whole number of steps", lambda v: v >= 0 and (v < 1 or v % 1 == 0))
SEED = Range("0 or more and below 2**32", lambda v: 0 <= v < 2**32)
ALL_POSITIVE = Range("above 0, each of them", lambda v: min(v) > 0)


@dataclass(frozen=True)
class Setting:
    """One setting. None always means the default, which is itself None where there is nothing to say in advance."""

    path: str
    type: Any
    default: Any
    doc: str
    choices: tuple[str, ...] = ()
    range: Range | None = None

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def key(self) -> str:
        return self.path.rpartition(".")[2]


SECTIONS = {
    "model": "the pretrained model",
    "tune": "what is trained",
    "tune.lora": "the adapters of tune.method=lora, in PEFT's names",
    "tune.ia3": "the vectors of tune.method=ia3, in PEFT's names",
    "tune.prompt_tuning": "the soft prompt of tune.method=prompt_tuning",
    "tune.last_n": "what tune.method=last_n trains",
    "tune.regex": "what tune.method=regex trains",
    "data": "rows in, token batches out",
    "objective": "the loss",
    "optim": "the optimizer and its schedule",
    "train": "the run",
    "log": "what is written while it runs",
    "evaluate": "what is generated at evaluations, and scored at the end",
}

Paths = tuple[Path, ...]
Numbers = tuple[float, ...]
Columns = dict[str, str]
Targets = str | tuple[str, ...]
Names = tuple[str, ...]
ClassWeights = str | tuple[float, ...]
MicroBatch = int | str

TASKS = ("causal_lm", "sequence_classification", "token_classification")
PROBLEM_TYPES = ("auto", "single_label_classification", "multi_label_classification", "regression")
POOLINGS = ("auto", "cls", "mean", "last")
Integers = tuple[int, ...]
Ranks = tuple[tuple[str, int], ...]
Alphas = tuple[tuple[str, float], ...]

ADAPTERS = ("lora", "ia3", "prompt_tuning")  # their result is a PEFT directory
METHODS = (*ADAPTERS, "full", "head", "bitfit", "norms", "embeddings", "last_n", "regex")
AUTO = ("auto", "on", "off")
FORMATS = ("auto", "chat", "prompt_completion", "instruction", "sharegpt", "text")

SETTINGS = (
    Setting("model.path", Path, None, "Hugging Face directory or hub id (required)"),
    Setting("model.init", str, "pretrained", "random: only config and tokenizer are read", ("pretrained", "random")),
    Setting("model.tokenizer", Path, None, "directory or hub id of the tokenizer; default: model.path"),
    Setting("model.chat_template", Path, None, "a Jinja file; default: the tokenizer's own"),
    Setting("model.dtype", str, "auto", "auto: bfloat16 on GPU, float32 on CPU", ("auto", "float32", "bfloat16")),
    Setting("model.attention", str, "auto", "auto: the best for the device", ("auto", "mapped", "xla", "cudnn")),
    Setting("model.remat", str, "none", "recomputed to save memory", ("none", "full", "dots", "attention")),
    Setting("model.quantization", str, "none", "of the frozen body, while it is read", ("none", "nf4", "int8", "fp8")),
    Setting("model.unroll", int, 1, "layers unrolled in each step of the scan; copies weights", range=AT_LEAST_1),
    #
    Setting("tune.method", str, "lora", "adapters, all weights, or a part of them (head: final norm too)", METHODS),
    Setting("tune.lora.r", int, 8, "rank", range=AT_LEAST_1),
    Setting("tune.lora.lora_alpha", float, 8.0, "the update is scaled by lora_alpha / r", range=POSITIVE),
    Setting("tune.lora.lora_dropout", float, 0.0, "on the input of the adapters", range=BELOW_1),
    Setting("tune.lora.target_modules", Targets, "all-linear", "all-linear, module names, or a regex over full names"),
    Setting("tune.lora.bias", str, "none", "which biases are trained too", ("none", "all", "lora_only")),
    Setting("tune.lora.use_rslora", bool, False, "scale by lora_alpha / sqrt(r)"),
    Setting("tune.lora.use_dora", bool, False, "train direction and magnitude apart (DoRA)"),
    Setting("tune.lora.init_lora_weights", str, "default", "how adapters begin", ("default", "gaussian", "pissa")),
    Setting("tune.lora.rank_pattern", Ranks, None, "other ranks for modules whose names end in a regex"),
    Setting("tune.lora.alpha_pattern", Alphas, None, "other alphas, as rank_pattern"),
    Setting("tune.lora.layers_to_transform", Integers, None, "numbers of the layers with adapters; default: all"),
    Setting("tune.lora.exclude_modules", Targets, None, "module names or a regex that win over target_modules"),
    Setting("tune.lora.modules_to_save", Names, None, "modules that are trained whole, such as embed_tokens,lm_head"),
    Setting("tune.lora.trainable_token_indices", Integers, None, "rows of the token embedding that are trained"),
    Setting("tune.ia3.target_modules", Targets, ("k_proj", "v_proj", "down_proj"), "module names or a regex"),
    Setting("tune.ia3.feedforward_modules", Targets, ("down_proj",), "targets whose input is scaled, not the output"),
    Setting("tune.ia3.exclude_modules", Targets, None, "module names or a regex that win over target_modules"),
    Setting("tune.prompt_tuning.num_virtual_tokens", int, 20, "vectors before each row", range=AT_LEAST_1),
    Setting("tune.prompt_tuning.init", str, "vocab", "rows of the embedding, or N(0, 1)", ("vocab", "random")),
    Setting("tune.last_n.layers", int, 2, "blocks from the top, trained with the final norm", range=AT_LEAST_1),
    Setting("tune.regex.pattern", str, ".*", "over whole HF names: model.layers.0.mlp.up_proj.weight"),
    #
    Setting("data.train", Paths, None, "files, directories or hub ids (required)"),
    Setting("data.weights", Numbers, None, "how often each source is drawn; default: by its size", range=ALL_POSITIVE),
    Setting("data.eval", Paths, None, "held-out data, given as data.train is"),
    Setting("data.eval_fraction", float, 0.0, "share of data.train held out, chosen by content", range=BELOW_1),
    Setting("data.format", str, "auto", "how a row is read; auto: by its columns", FORMATS),
    Setting("data.columns", Columns, {}, "our name of a column and the file's: prompt=question,completion=answer"),
    Setting("data.template", str, None, r"a text made of the file's columns: 'Q: {question}\nA: {answer}'"),
    Setting("data.completion_from", str, None, "text after which tokens are trained (data.format=text, data.template)"),
    Setting("data.system", str, None, "a system prompt for conversations that have none"),
    Setting("data.max_length", int, None, "tokens a row; default: the model's, at most 1024", range=AT_LEAST_2),
    Setting("data.overlength", str, "drop", "what happens to longer rows", ("drop", "truncate", "split")),
    Setting("data.packing", bool, False, "several rows in one sequence; none sees another"),
    Setting("data.group_by_length", bool, False, "batches of rows of like length: less padding, a little less random"),
    Setting("data.cache", bool, True, "keep tokenised rows on disk"),
    #
    Setting("objective.name", str, "causal_lm", "the task", TASKS),
    Setting("objective.problem_type", str, "auto", "auto: the model's, else one label a text", PROBLEM_TYPES),
    Setting("objective.labels", Names, None, "names of the labels in order; default: the model's, else the data's"),
    Setting("objective.class_weights", ClassWeights, None, "of the loss: balanced, or a number for each label"),
    Setting("objective.pooling", str, "auto", "from tokens to a text; auto: the family's", POOLINGS),
    Setting("objective.z_loss", float, 0.0, "weight of the squared log partition function", range=NOT_NEGATIVE),
    #
    Setting("optim.name", str, "adamw", "the optimizer", ("adamw", "sgd", "lion")),
    Setting("optim.lr", float, None, "peak learning rate; default: full 1e-5, lora 2e-4, head 1e-3", range=POSITIVE),
    Setting("optim.loraplus_lr_ratio", float, 1.0, "LoRA+: the rate of B is this times lr", range=POSITIVE),
    Setting("optim.schedule", str, "cosine", "from the peak to min_lr_ratio of it", ("constant", "linear", "cosine")),
    Setting("optim.warmup", float, 0.03, "below 1: share of the steps; from 1: steps", range=SHARE_OR_STEPS),
    Setting("optim.min_lr_ratio", float, 0.0, "where the schedule ends, as a share of lr", range=UP_TO_1),
    Setting("optim.weight_decay", float, 0.0, "decoupled, on matrices only", range=NOT_NEGATIVE),
    Setting("optim.grad_clip", float, 1.0, "largest global norm of the gradient; 0: off", range=NOT_NEGATIVE),
    Setting("optim.b1", float, 0.9, "decay of the first moment (adamw, lion)", range=BELOW_1),
    Setting("optim.b2", float, 0.999, "decay of the second moment (adamw, lion)", range=BELOW_1),
    Setting("optim.eps", float, 1e-8, "added to the root of the second moment (adamw)", range=POSITIVE),
    Setting("optim.momentum", float, 0.9, "decay of the velocity (sgd)", range=BELOW_1),
    #
    Setting("train.steps", int, None, "optimizer steps; this or epochs", range=AT_LEAST_1),
    Setting("train.epochs", float, None, "passes over data.train; default: 1", range=POSITIVE),
    Setting("train.batch_size", int, 8, "rows in an optimizer step, over all devices", range=AT_LEAST_1),
    Setting(
        "train.grad_accum", int, None, "parts a batch is computed in, to save memory; default: 1", range=AT_LEAST_1
    ),
    Setting("train.micro_batch", MicroBatch, None, "or rows of a part; auto: with model.remat, as the memory allows"),
    Setting("train.eval_every", int, 0, "steps; 0: after each epoch and at the end", range=NOT_NEGATIVE),
    Setting("train.eval_batches", int, 0, "batches in an evaluation; 0: all", range=NOT_NEGATIVE),
    Setting("train.save_every", int, 0, "steps; 0: at evaluations and at the end", range=NOT_NEGATIVE),
    Setting("train.keep", int, 2, "checkpoints kept beside the best", range=AT_LEAST_1),
    Setting("train.early_stop", int, 0, "evaluations without improvement before stopping; 0: off", range=NOT_NEGATIVE),
    Setting("train.cache_features", str, "auto", "what lies below all that is trained, computed once", AUTO),
    Setting("train.cache_gib", float, 20.0, "most that such features of all runs take on disk", range=POSITIVE),
    Setting("train.seed", int, 0, "of the order of rows, dropout and initial values", range=SEED),
    #
    Setting("log.every", int, 10, "steps", range=AT_LEAST_1),
    Setting("log.tensorboard", bool, True, "write event files"),
    Setting("log.wandb", bool, False, "also log to Weights & Biases"),
    Setting("log.progress", bool, True, "show a progress bar on a terminal"),
    Setting("log.plot", bool, True, "and a plot of the losses above it"),
    #
    Setting("evaluate.samples", int, 0, "held-out rows to continue at each evaluation", range=NOT_NEGATIVE),
    Setting("evaluate.prompts", Names, None, "texts to continue at each evaluation"),
    Setting("evaluate.json", bool, False, "generate JSON for held-out rows; score valid and exact"),
    Setting("evaluate.max_new_tokens", int, 64, "longest generated answer", range=AT_LEAST_1),
    Setting("evaluate.rows", int, 100, "held-out rows to generate for", range=AT_LEAST_1),
)
BY_PATH = {setting.path: setting for setting in SETTINGS}

REQUIRED = ("model.path", "data.train")

# What other tools call a setting: used to suggest our name, never accepted.
OTHER_NAMES = {
    "model_name_or_path": "model.path",
    "gradient_checkpointing": "model.remat",
    "rank": "tune.lora.r",
    "alpha": "tune.lora.lora_alpha",
    "dataset": "data.train",
    "val_set_size": "data.eval_fraction",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
    "max_grad_norm": "optim.grad_clip",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.grad_accum",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep",
    "early_stopping_patience": "train.early_stop",
    "logging_steps": "log.every",
}

DEFAULT_LR = {
    **{"full": 1e-5, "lora": 2e-4, "head": 1e-3, "bitfit": 1e-3, "norms": 1e-3, "embeddings": 1e-4},
    **{"last_n": 1e-5, "regex": 1e-5, "ia3": 3e-3, "prompt_tuning": 3e-2},
}

# Defaults that follow from other settings: what is left None becomes a value in the resolved config.
DERIVED: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "model.tokenizer": lambda values: values["model.path"],
    "optim.lr": lambda values: DEFAULT_LR[values["tune.method"]],
    "train.epochs": lambda values: 1.0 if values["train.steps"] is None else None,
    "train.micro_batch": lambda values: values["train.batch_size"] // (values["train.grad_accum"] or 1),
    "train.grad_accum": lambda values: (
        values["train.batch_size"] // values["train.micro_batch"] if isinstance(values["train.micro_batch"], int) else 1
    ),
}

# What may differ when a run goes on in its workdir: how long, how often, and what is written; never what is computed.
RESUMABLE = frozenset(
    [
        *("train.steps", "train.epochs", "train.eval_every", "train.eval_batches", "train.early_stop"),
        *("train.save_every", "train.keep", "train.cache_features", "train.cache_gib"),
        *("data.cache", "log", "evaluate"),
    ]
)


class Idle(NamedTuple):
    """Settings (or a section) that change nothing while `when` holds: if given, and not as OFF, they are an error."""

    paths: tuple[str, ...]
    when: Callable[[Mapping[str, Any]], bool]
    because: str  # {a.b} stands for the value of setting a.b


OFF = (0, False, "auto", "none", {})


def _no_eval_data(values: Mapping[str, Any]) -> bool:
    return not values["data.eval"] and not values["data.eval_fraction"]


IDLE = (
    *(
        Idle((f"tune.{name}",), lambda v, name=name: v["tune.method"] != name, "tune.method is {tune.method}")
        for name in ("lora", "ia3", "prompt_tuning", "last_n", "regex")
    ),
    Idle(("optim.loraplus_lr_ratio",), lambda v: v["tune.method"] != "lora", "tune.method is {tune.method}"),
    Idle(("optim.b1", "optim.b2"), lambda v: v["optim.name"] == "sgd", "optim.name is sgd"),
    Idle(("optim.eps",), lambda v: v["optim.name"] != "adamw", "optim.name is {optim.name}"),
    Idle(("optim.momentum",), lambda v: v["optim.name"] != "sgd", "optim.name is {optim.name}, not sgd"),
    Idle(("optim.min_lr_ratio",), lambda v: v["optim.schedule"] == "constant", "optim.schedule is constant"),
    Idle(("data.group_by_length",), lambda v: v["data.packing"], "data.packing leaves nothing to pad"),
    Idle(("data.eval_fraction",), lambda v: v["data.eval"], "data.eval names the held-out data"),
    Idle(("data.weights",), lambda v: v["data.train"] and len(v["data.train"]) == 1, "data.train has one source"),
    Idle(("model.chat_template", "data.system"), lambda v: v["data.format"] == "text", "data.format is text"),
    Idle(
        ("model.chat_template", "data.system", "data.format", "data.columns"),
        lambda v: v["data.template"],
        "data.template makes a text of the file's own columns",
    ),
    Idle(
        ("data.completion_from",),
        lambda v: not v["data.template"] and v["data.format"] not in ("auto", "text"),
        "the completion of {data.format} rows is known",
    ),
    Idle(
        ("train.eval_every", "train.eval_batches", "train.early_stop", "evaluate"),
        _no_eval_data,
        "there is nothing to evaluate on: give data.eval or data.eval_fraction",
    ),
    Idle(
        (
            *("model.chat_template", "data.system", "data.format", "data.template", "data.completion_from"),
            *("data.packing", "objective.z_loss", "evaluate"),
        ),
        lambda v: v["objective.name"] != "causal_lm",
        "objective.name is {objective.name}",
    ),
    Idle(
        ("objective.labels", "objective.class_weights"),
        lambda v: v["objective.name"] == "causal_lm",
        "objective.name is causal_lm",
    ),
    Idle(
        ("objective.problem_type", "objective.pooling"),
        lambda v: v["objective.name"] != "sequence_classification",
        "objective.name is {objective.name}",
    ),
    Idle(
        ("objective.labels", "objective.class_weights"),
        lambda v: v["objective.problem_type"] == "regression",
        "objective.problem_type is regression",
    ),
    Idle(("evaluate.rows",), lambda v: not v["evaluate.json"], "evaluate.json is off"),
    Idle(
        ("evaluate.max_new_tokens",),
        lambda v: not (v["evaluate.json"] or v["evaluate.samples"] or v["evaluate.prompts"]),
        "evaluate.json, evaluate.samples and evaluate.prompts are off",
    ),
    Idle(("log.plot",), lambda v: not v["log.progress"], "log.progress is off"),
    Idle(("train.cache_gib",), lambda v: v["train.cache_features"] == "off", "train.cache_features is off"),
)


# ---------------------------------------------------------------------------------------------------- the types


class Explained(ValueError):
    """A ValueError whose message belongs in the user's."""


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _path(value: Any) -> str:
    return os.path.expanduser(_text(os.fspath(value) if isinstance(value, os.PathLike) else value))


def _sequence(value: Any, item: Callable[[Any], Any]) -> tuple:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError
    return tuple(map(item, value))


def _paths(value: Any) -> tuple[str, ...]:
    if isinstance(value, os.PathLike):
        value = (value,)
    return _sequence(value.split(",") if isinstance(value, str) else value, _path)


def _class_weights(value: Any) -> str | tuple[float, ...]:
    if isinstance(value, str):
        if value != "balanced":
            raise ValueError
        return value
    weights = _sequence(value, _number)
    if min(weights) <= 0:
        raise Explained("each must be above 0")
    return weights


def _micro_batch(value: Any) -> int | str:
    if isinstance(value, str):
        if value != "auto":
            raise ValueError
        return value
    if _integer(value) < 1:
        raise Explained("it must be 1 or more")
    return int(value)


def _pairs(item: Callable[[Any], Any]) -> Callable[[Any], tuple]:
    """Checks ((regex, value), ...). A ConfigDict takes no dots in a key, so it cannot be a mapping."""

    def check(value: Any) -> tuple:
        pairs = _sequence(value, lambda pair: pair)
        if any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
            raise ValueError
        return tuple((_text(key), item(v)) for key, v in pairs)

    return check


def _pairs_of_text(item: Callable[[str], Any]) -> Callable[[str], tuple]:
    return lambda text: tuple((_text(k), item(v)) for k, _, v in (pair.rpartition("=") for pair in text.split(",")))


def _mapping(value: Any) -> dict[str, str]:
    if not _is_mapping(value):
        raise ValueError
    pairs = {_text(k): _text(v) for k, v in value.items()}
    if any("." in k for k in pairs):
        raise ValueError
    return pairs


def _targets(value: Any) -> str | tuple[str, ...]:
    """Names become a tuple, also a single one: as a regex it would have to be a module's full name."""
    if not isinstance(value, str):
        return _sequence(value, _text)
    if re.fullmatch(r"[\w.]+(,[\w.]+)*", value):
        return tuple(value.split(","))
    try:
        re.compile(_text(value))
    except re.error as error:
        raise Explained(f"as a regular expression it is malformed: {error}") from None
    return value


def _unescape(text: str) -> str:
    r"""A shell passes `\n` as two characters."""
    return re.sub(r"\\([nt\\])", lambda m: {"n": "\n", "t": "\t", "\\": "\\"}[m[1]], text)


def _switch_of_text(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _mapping_of_text(text: str) -> dict[str, str]:
    pairs = [pair.partition("=")[::2] for pair in text.split(",")]
    if len(dict(pairs)) < len(pairs):
        raise Explained("a key is given twice")
    return _mapping(dict(pairs))


class Kind(NamedTuple):
    """How values of a type are named, read from the command line and checked; both raise ValueError."""

    label: str
    expected: str
    from_text: Callable[[str], Any]
    from_value: Callable[[Any], Any]


KINDS = {
    int: Kind("int", "an integer", int, _integer),
    float: Kind("float", "a finite number", lambda text: _number(float(text)), _number),
    bool: Kind("bool", "true or false", _switch_of_text, _switch),
    str: Kind("str", "a string that is not empty", lambda text: _unescape(_text(text)), _text),
    Path: Kind("path", "a path or hub id", _path, _path),
    Paths: Kind("path,...", "paths or hub ids (a,b on the command line, a string or tuple in a file)", _paths, _paths),
    Numbers: Kind(
        "float,...",
        "finite numbers (1,2 on the command line, a tuple in a file)",
        lambda text: tuple(_number(float(item)) for item in text.split(",")),
        lambda value: _sequence(value, _number),
    ),
    Columns: Kind(
        "a=b,...",
        "a mapping of plain names to columns (a=b,c=d on the command line, a dict in a file)",
        _mapping_of_text,
        _mapping,
    ),
    Names: Kind(
        "str,...",
        "names (a,b on the command line, a tuple in a file)",
        lambda text: tuple(map(_text, text.split(","))),
        lambda value: _sequence(value, _text),
    ),
    ClassWeights: Kind(
        "float,...",
        "balanced, or numbers (1,2 on the command line, a tuple in a file)",
        lambda text: _class_weights(text if text == "balanced" else tuple(map(float, text.split(",")))),
        _class_weights,
    ),
    MicroBatch: Kind(
        "int",
        "auto, or an integer",
        lambda text: _micro_batch(text if text == "auto" else int(text)),
        _micro_batch,
    ),
    Integers: Kind(
        "int,...",
        "integers (1,2 on the command line, a tuple in a file)",
        lambda text: tuple(int(item) for item in text.split(",")),
        lambda value: _sequence(value, _integer),
    ),
    Ranks: Kind(
        "regex=int,...",
        "pairs (q_proj=4,layers.0=8 on the command line, a tuple of pairs in a file)",
        _pairs_of_text(int),
        _pairs(_integer),
    ),
    Alphas: Kind(
        "regex=float,...",
        "pairs (q_proj=4,layers.0=8 on the command line, a tuple of pairs in a file)",
        _pairs_of_text(lambda text: _number(float(text))),
        _pairs(_number),
    ),
    Targets: Kind("str,...", "all-linear, module names (a,b or a tuple) or a regex", _targets, _targets),
}


def _is_mapping(value: Any) -> bool:
    """ConfigDict is not a collections.abc.Mapping."""
    return isinstance(value, Mapping) or hasattr(value, "items")


# ------------------------------------------------------------------------------------------------- resolving


class Given(NamedTuple):
    """A value somebody wrote, and where: a file, or the flag as typed."""

    value: Any
    origin: str


def schema() -> "ConfigDict":
    """Return all settings at their defaults, as a locked ConfigDict (the derived ones are None)."""
    from ml_collections import ConfigDict

    return ConfigDict(_nested({s.path: s.default for s in SETTINGS})).lock()


def resolve(
    overrides: "ConfigDict | Mapping | None" = None,
    flags: Mapping[str, str] | None = None,
    *,
    source: str = "the config",
    required: Iterable[str] = REQUIRED,
) -> "FrozenConfigDict":
    """Merge defaults, a file's overrides and the command line, check everything, and return the frozen config.

    Args:
      overrides: nested, with keys of the schema only. None takes a setting back to its default. What loses its effect
        by a flag is taken back with it.
      flags: setting path -> text as typed on the command line; wins over `overrides`; "none" takes back.
      source: what an error calls `overrides`.
      required: settings that must be given.

    The result holds every setting; `optim.lr`, `train.epochs` and `model.tokenizer` hold the value that applies.
    `data.train` and `data.eval` are tuples, `tune.lora.target_modules` is a tuple of names, "all-linear" or a regex.

    Raises:
      UserError: with one line for each thing that is wrong.
    """
    from ml_collections import FrozenConfigDict

    problems: list[str] = []
    file = dict(_read_overrides(overrides or {}, source, problems))
    given = file | dict(_read_flags(flags or {}, problems))
    given, file = ({path: g for path, g in some.items() if g.value is not None} for some in (given, file))
    values = _values(given)
    if not problems:
        lost = _overruled(given, file)
        given = {path: g for path, g in given.items() if path not in lost}
        values = _values(given)
        problems = [*_missing(values, required), *_conflicts(values), *_idle(values, given)]
    _refuse(problems)
    return FrozenConfigDict(_nested(_derive(values)))


def _values(given: Mapping[str, Given]) -> dict[str, Any]:
    return {s.path: given[s.path].value if s.path in given else s.default for s in SETTINGS}


def _overruled(given: Mapping[str, Given], file: Mapping[str, Given]) -> set[str]:
    """Settings of the file that have an effect there, and none since the command line changed another: taken back.

    So `--config.tune.method=full` makes a LoRA recipe one for full tuning.
    """
    idle = [p for rule in IDLE if rule.when(_values(given)) and not rule.when(_values(file)) for p in rule.paths]
    return {path for path, g in file.items() if _within(path, idle) and given.get(path) is g}


def notes(config: "ConfigDict") -> list[str]:
    """Return what the log should say about choices that the user may not have made."""
    said = []
    if config.optim.lr == DEFAULT_LR[config.tune.method]:
        said.append(f"optim.lr is {config.optim.lr:g}, the default for tune.method={config.tune.method}")
    if _no_eval_data(dict(_flat(config))):
        said.append("no held-out data: the last weights count as the best; data.eval_fraction=0.05 would hold some out")
    return said


def _derive(values: Mapping[str, Any]) -> dict[str, Any]:
    return values | {path: rule(values) for path, rule in DERIVED.items() if values[path] is None}


def _read_overrides(tree: Any, source: str, problems: list[str], prefix: str = "") -> Iterator[tuple[str, Given]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        try:
            if path in SECTIONS and _is_mapping(value):
                yield from _read_overrides(value, source, problems, f"{path}.")
            else:
                yield path, Given(None if value is None else read_value(path, value, source), source)
        except UserError as error:
            problems.append(str(error))


def _read_flags(flags: Mapping[str, str], problems: list[str]) -> Iterator[tuple[str, Given]]:
    for path, text in flags.items():
        flag = f"--config.{path}={text}"
        try:
            yield path, Given(None if text.lower() == "none" else read_value(path, text, flag), flag)
        except UserError as error:
            problems.append(str(error))


def read_value(path: str, raw: Any, origin: str) -> Any:
    """Return `raw` (text, if a flag is its origin) in the setting's type, within its choices and range."""
    setting = find_setting(path, origin)
    kind = KINDS[setting.type]
    is_flag = origin.startswith("--")
    try:
        value = kind.from_text(raw) if is_flag else kind.from_value(raw)
    except ValueError as error:
        found = "" if is_flag else f"{path} is {raw!r} ({type(raw).__name__}); "
        hint = f"; {error}" if isinstance(error, Explained) else "" if is_flag else _without_quotes(setting, raw)
        raise UserError(f"{origin}: {found}expected {kind.expected}{hint}") from None
    if setting.choices and value not in setting.choices:
        close = nearest(value, setting.choices, n=1)
        raise UserError(f"{origin}: {path} is {value!r}; choose from {', '.join(setting.choices)}.{close}")
    if setting.range and not setting.range.holds(value):
        raise UserError(f"{origin}: {path} is {value!r}; it must be {setting.range.words}")
    return value


def _without_quotes(setting: Setting, raw: Any) -> str:
    """A number or a switch in quotes is a string in Python: say so where that is all that is wrong ("2e-5")."""
    if setting.type not in (int, float, bool) or not isinstance(raw, str):
        return ""
    try:
        value = KINDS[setting.type].from_text(raw)
    except ValueError:
        return ""
    return f": write {value if setting.type is bool else raw} without the quotes"


def find_setting(path: str, origin: str) -> Setting:
    """Return the setting at `path`. Raises UserError with the nearest names and the section's keys."""
    if path in BY_PATH:
        return BY_PATH[path]
    section = path
    while section and section not in SECTIONS:
        section = section.rpartition(".")[0]
    prefix = f"{section}." if section else ""
    inside = [p.removeprefix(prefix) for p in (*BY_PATH, *SECTIONS) if p.startswith(prefix)]
    listed = f"{f'Settings in {section}' if section else 'Sections'}: {', '.join(p for p in inside if '.' not in p)}."
    if path in SECTIONS:
        raise UserError(f"{origin}: {path} is a section, not a setting. {listed}")
    raise UserError(f"{origin}: there is no setting {path}.{did_you_mean(path)} {listed}")


def did_you_mean(path: str) -> str:
    """The settings with this key in another section, or the one another tool calls so; else the nearest."""
    same = namesakes(path)
    return f" Did you mean {' or '.join(map(repr, same))}?" if same else nearest(path, BY_PATH, n=1)


def namesakes(path: str) -> list[str]:
    key = path.rpartition(".")[2].replace("-", "_")
    return [s.path for s in SETTINGS if s.key == key or s.path == OTHER_NAMES.get(key)]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} problems in the config:", *problems][len(problems) == 1 :]))


def _missing(values: Mapping[str, Any], required: Iterable[str]) -> Iterator[str]:
    for path in required:
        if values[path] is None:
            what = BY_PATH[path].doc.removesuffix(" (required)")
            yield f"{path} is not set ({what}): give --config.{path}=... or set it in the config file"


def _conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    if values["train.steps"] is not None and values["train.epochs"] is not None:
        yield (
            f"train.steps={values['train.steps']} and train.epochs={values['train.epochs']:g} are both given; keep one "
            "(--config.train.epochs=none takes back what a file says)"
        )
    if values["train.grad_accum"] is not None and values["train.micro_batch"] is not None:
        yield (
            f"train.grad_accum={values['train.grad_accum']} and train.micro_batch={values['train.micro_batch']} both "
            "split a batch; keep one (--config.train.grad_accum=none takes back what a file says)"
        )
    elif values["train.batch_size"] % (values["train.grad_accum"] or 1):
        yield (
            f"train.batch_size={values['train.batch_size']} rows cannot be split into "
            f"train.grad_accum={values['train.grad_accum']} equal parts; choose a divisor of the batch size"
        )
    elif isinstance(values["train.micro_batch"], int) and values["train.batch_size"] % values["train.micro_batch"]:
        yield (
            f"train.batch_size={values['train.batch_size']} rows cannot be split into parts of "
            f"train.micro_batch={values['train.micro_batch']}; choose a divisor of the batch size"
        )
    labels = values["objective.labels"] or ()
    if twice := next((name for name in labels if labels.count(name) > 1), None):
        yield f"objective.labels has {twice!r} twice; each label has one name"
    if values["objective.name"] != "causal_lm" and values["data.overlength"] == "split":
        yield (
            f"data.overlength=split has no meaning for {values['objective.name']}, whose labels belong to whole rows; "
            "choose drop or truncate"
        )
    sources, weights = values["data.train"] or (), values["data.weights"] or ()
    if len(sources) > 1 and weights and len(weights) != len(sources):
        yield f"data.weights has {len(weights)} numbers and data.train {len(sources)} sources; give one weight a source"


def _idle(values: Mapping[str, Any], given: Mapping[str, Given]) -> Iterator[str]:
    for rule in IDLE:
        if not rule.when(values):
            continue
        because = re.sub(r"\{([\w.]+)\}", lambda m: str(values[m[1]]), rule.because)
        for path, (value, origin) in given.items():
            if value not in OFF and _within(path, rule.paths):
                yield (
                    f"{origin}: {path} has no effect: {because}. Remove it"
                    + ("" if origin.startswith("--") else f", or take it back with --config.{path}=none")
                )


def _within(path: str, paths: Iterable[str]) -> bool:
    return any(path == p or path.startswith(f"{p}.") for p in paths)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *sections, key = path.split(".")
        reduce(lambda node, name: node.setdefault(name, {}), sections, tree)[key] = value
    return tree


def _flat(config: "ConfigDict") -> Iterator[tuple[str, Any]]:
    for setting in SETTINGS:
        value = reduce(lambda node, name: node[name], setting.path.split("."), config)
        yield setting.path, dict(value) if setting.type is Columns else value


# ---------------------------------------------------------------------------------- a run's config.json, resuming


def to_json(config: "ConfigDict", versions: Mapping[str, str] | None = None) -> str:
    """Return a resolved config as JSON: one object a section, and `versions` beside them if given."""
    tree = _nested(dict(_flat(config)))
    return json.dumps(tree | ({"versions": dict(versions)} if versions else {}), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str, source: str = "config.json") -> "FrozenConfigDict":
    """Return the config that `to_json` wrote; settings that are younger than the file get their defaults.

    Raises:
      UserError: not JSON, or not a config.
    """
    return resolve(_overrides_in_json(text, source), source=source, required=())


def changes(old: "ConfigDict", new: "ConfigDict") -> list[tuple[str, Any, Any]]:
    """Return `(path, old value, new value)` for each setting that differs, in the order of the schema."""
    return [(path, a, b) for (path, a), (_, b) in zip(_flat(old), _flat(new), strict=True) if a != b]


def check_resume(old: "ConfigDict", new: "ConfigDict") -> None:
    """Refuse to go on with a config that computes something else than `old` did.

    Raises:
      UserError: naming each difference outside RESUMABLE.
    """
    refused = [c for c in changes(old, new) if not _within(c[0], RESUMABLE)]
    if refused:
        lines = [f"{path}: {a!r} -> {b!r}" for path, a, b in refused]
        raise UserError(
            "the workdir holds a run with another config; nothing was changed:\n  "
            + "\n  ".join(lines)
            + "\nTake the differences back to go on with that run, or give another --workdir."
        )


def replaced(config: "ConfigDict", values: Mapping[str, Any]) -> "FrozenConfigDict":
    """Return a resolved config with other values for some settings, path -> value; they are not checked again."""
    from ml_collections import FrozenConfigDict

    return FrozenConfigDict(_nested(dict(_flat(config)) | dict(values)))


def overrides(config: "ConfigDict") -> list[tuple[str, Any]]:
    """Return `(path, value)` of the settings that a config has beyond the defaults, as a file would give them."""
    tree = _overrides_in_json(to_json(config), "config")
    return [(path, g.value) for path, g in _read_overrides(tree, "config", [])]


def _overrides_in_json(text: str, source: str) -> dict[str, Any]:
    """Return what a `config.json` says beyond the defaults, so that other settings of it can be overridden freely.

    A derived value (the learning rate of its method, say) is dropped too: it follows the settings it was derived from.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{source}: expected an object of sections, as a run writes it; found {type(tree).__name__}")
    tree.pop("versions", None)
    problems: list[str] = []
    given = {path: g.value for path, g in _read_overrides(tree, source, problems)}
    _refuse(problems)
    values = {path: s.default if given.get(path) is None else given[path] for path, s in BY_PATH.items()}
    for path, rule in DERIVED.items():
        if values[path] == rule(values):
            values[path] = None
    return _nested({path: value for path, value in values.items() if value != BY_PATH[path].default})


# ---------------------------------------------------------------------------------------------------- config files


def load_file(spec: str) -> tuple[Any, str]:
    """Run the `get_config` of a config file, or read a run's `config.json`.

    Args:
      spec: `FILE.py`, `FILE.py:ARG` (ARG is passed to `get_config`) or `FILE.json`.

    Returns:
      (overrides, source): a mapping with the file's overrides, and the file's name for messages.

    Raises:
      UserError: no such file, no `get_config`, an error inside it (named by file and line), not a config.
    """
    head, colon, argument = spec.partition(".py:")
    path = Path(os.path.expanduser(f"{head}.py" if colon else spec))
    if not path.is_file():
        raise UserError(f"--config={spec}: {_no_such_file(path)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config={spec}: cannot be read: {error}") from None
    if path.suffix == ".json":
        return _overrides_in_json(text, str(path)), str(path)
    if path.suffix != ".py":
        raise UserError(f"--config={spec}: expected a .py file with get_config(), or the config.json of a run")
    with _user_code(path):
        namespace: dict[str, Any] = {"__name__": "jaxtune_config_file", "__file__": str(path)}
        exec(compile(text, str(path), "exec"), namespace)
        get_config = namespace.get("get_config")
        if not callable(get_config):
            raise UserError(f"{path}: a config file defines get_config(), which returns a ConfigDict of overrides")
        if colon and not inspect.signature(get_config).parameters:
            raise UserError(f"--config={spec}: get_config() in {path} takes no argument; drop {':' + argument!r}")
        overrides = get_config(argument) if colon else get_config()
    if not _is_mapping(overrides):
        found = type(overrides).__name__
        raise UserError(f"{path}: get_config() returned {found}; expected a ConfigDict of overrides")
    return overrides, str(path)


@contextmanager
def _user_code(path: Path) -> Iterator[None]:
    """Let a config file import what lies beside it, leave no trace of that, and turn its errors into UserError."""
    folder = path.resolve().parent
    modules, write_bytecode = set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # an edit within the same second would be run from the stale file
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if Path(f.filename).resolve().parent == folder]
        where = f"{own[-1].filename}:{own[-1].lineno}" if own else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    finally:
        sys.dont_write_bytecode = write_bytecode
        sys.path.remove(str(folder))
        for name in set(sys.modules) - modules:  # another folder's common.py is another module
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).resolve().parent == folder:
                del sys.modules[name]


def _no_such_file(path: Path) -> str:
    if (path / "config.json").is_file():
        return f"it is a directory. Did you mean '{path / 'config.json'}'?"
    folders = dict.fromkeys([path.parent, Path("."), Path("configs")])
    candidates = {str(p) for folder in folders for p in folder.glob("*.py")}
    same = sorted(c for c in candidates if Path(c).stem == path.stem)
    return "no such file." + (f" Did you mean {same[0]!r}?" if same else nearest(str(path), candidates))
