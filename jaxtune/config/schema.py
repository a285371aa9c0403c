"""Every setting of jaxtune: the table SETTINGS, with type, default, choices, range and one line of meaning.

Beside it, defaults that follow from other settings (DERIVED), settings without effect under others (IDLE), and those
that may change when a run is resumed (RESUMABLE). Nothing here imports jax.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.methods import settings as methods
from jaxtune.objectives import answers, contrasts
from jaxtune.objectives.task import TASKS, unread
from jaxtune.train import optimizers


class Range(NamedTuple):
    """The values that a setting may have, in words and as a predicate."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE = Range("above 0", lambda v: v > 0)
NOT_NEGATIVE = Range("0 or more", lambda v: v >= 0)
AT_LEAST_1 = Range("1 or more", lambda v: v >= 1)
ROWS = Range("1 or more, at most 1,000,000", lambda v: 1 <= v <= 10**6)
TOKENS = Range("2 or more, at most 10,000,000", lambda v: 2 <= v <= 10**7)
BELOW_1 = Range("0 or more and below 1", lambda v: 0 <= v < 1)
INSIDE_1 = Range("above 0 and below 1", lambda v: 0 < v < 1)
TOP_K = Range("0 or more, at most 4,096", lambda v: 0 <= v <= 4096)
UP_TO_1 = Range("from 0 to 1", lambda v: 0 <= v <= 1)
SHARE_OR_STEPS = Range("a share below 1 or a whole number of steps", lambda v: v >= 0 and (v < 1 or v % 1 == 0))
DEVICES = Range("1 or more, or -1", lambda v: v >= 1 or v == -1)
SEED = Range("0 or more and below 2**32", lambda v: 0 <= v < 2**32)
ALL_POSITIVE = Range("above 0, each of them", lambda v: min(v) > 0)


@dataclass(frozen=True)
class Setting:
    """One setting. None: use the default; a default of None is filled in from other settings."""

    path: str
    type: Any
    default: Any
    doc: str
    choices: Collection[str] = ()
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
    "tune.hira": "the adapters of tune.method=hira, in PEFT's names",
    "tune.miss": "the adapters of tune.method=miss, in PEFT's names",
    "tune.ia3": "the vectors of tune.method=ia3, in PEFT's names",
    "tune.prompt_tuning": "the soft prompt of tune.method=prompt_tuning",
    "tune.last_n": "what tune.method=last_n trains",
    "tune.regex": "what tune.method=regex trains",
    "data": "rows in, token batches out",
    "objective": "the loss",
    "optim": "the optimizer and its schedule",
    "train": "the run",
    "mesh": "the devices, as data x fsdp x model",
    "log": "what is written during training",
    "evaluate": "texts to generate at evaluations, and scores of answers",
}

Paths = tuple[Path, ...]
Numbers = tuple[float, ...]
Columns = dict[str, str]
Targets = str | tuple[str, ...]
Names = tuple[str, ...]
ClassWeights = str | tuple[float, ...]
MicroBatch = int | str

PROBLEM_TYPES = ("auto", "single_label_classification", "multi_label_classification", "regression")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
RANKINGS = ("binary", "pairwise", "listwise")
POOLINGS = ("auto", "cls", "mean", "last")
Integers = tuple[int, ...]
Ranks = tuple[tuple[str, int], ...]
Alphas = tuple[tuple[str, float], ...]

METHODS = tuple(methods.ROWS)
ADAPTERS = tuple(name for name, row in methods.ROWS.items() if row.adapter)  # their result is a PEFT directory
AUTO = ("auto", "on", "off")
FORMATS = ("auto", "chat", "prompt_completion", "instruction", "sharegpt", "text")


def _of(setting: str, words: str) -> str:
    """The meaning of an optimizer's setting, with the optimizers that have it."""
    found = optimizers.defaults(setting)
    shown = [name if len(set(found.values())) == 1 else f"{name} {default:g}" for name, default in found.items()]
    return f"{words} ({', '.join(shown)})"


SETTINGS = (
    Setting("model.path", Path, None, "Hugging Face directory or hub id (required)"),
    Setting(
        "model.init",
        str,
        "pretrained",
        "random: new weights; only config and tokenizer are read",
        ("pretrained", "random"),
    ),
    Setting("model.adapter", Path, None, "PEFT directory to train further; model.path=ADAPTER sets it and its base"),
    Setting("model.tokenizer", Path, None, "directory or hub id of the tokenizer; default: model.path"),
    Setting("model.new_tokens", Names, None, "added to the tokenizer, with rows in the table; LoRA trains these rows"),
    Setting("model.chat_template", Path, None, "a Jinja file; default: the tokenizer's own"),
    Setting("model.dtype", str, "auto", "auto: bfloat16 on GPU, float32 on CPU", ("auto", "float32", "bfloat16")),
    Setting(
        "model.attention", str, "auto", "auto: the best for the device", ("auto", "mapped", "blocks", "xla", "cudnn")
    ),
    Setting(
        "model.remat",
        str,
        "none",
        "what to recompute to save memory; offload: as full, with what is kept in the host's memory",
        ("none", "full", "dots", "attention", "offload"),
    ),
    Setting(
        "model.quantization",
        str,
        "none",
        "frozen weights are stored so; fp8_matmul: products in fp8 too (Ada, Hopper and later); mxfp4: experts only",
        ("none", "nf4", "int8", "fp8", "fp8_matmul", "mxfp4"),
    ),
    #
    Setting("tune.method", str, "lora", "which weights are trained (head: with the final norm)", METHODS),
    Setting("tune.lora.r", int, 8, "rank", range=AT_LEAST_1),
    Setting("tune.lora.lora_alpha", float, 8.0, "the update is scaled by lora_alpha / r", range=POSITIVE),
    Setting("tune.lora.lora_dropout", float, 0.0, "dropout on the adapters' input", range=BELOW_1),
    Setting("tune.lora.target_modules", Targets, "all-linear", "all-linear, module names, or a regex over full names"),
    Setting("tune.lora.bias", str, "none", "which biases are trained too", ("none", "all", "lora_only")),
    Setting("tune.lora.use_rslora", bool, False, "scale by lora_alpha / sqrt(r)"),
    Setting("tune.lora.use_dora", bool, False, "train direction and magnitude separately (DoRA)"),
    Setting("tune.lora.init_lora_weights", str, "default", "initial values", ("default", "gaussian", "pissa")),
    Setting("tune.lora.rank_pattern", Ranks, None, "ranks of modules whose names end with a match of a regex"),
    Setting("tune.lora.alpha_pattern", Alphas, None, "alphas, as rank_pattern"),
    Setting("tune.lora.layers_to_transform", Integers, None, "indices of the layers with adapters; default: all"),
    Setting(
        "tune.lora.exclude_modules", Targets, None, "modules to leave out: names or a regex; wins over target_modules"
    ),
    Setting("tune.lora.modules_to_save", Names, None, "modules to train in full, such as embed_tokens,lm_head"),
    Setting(
        "tune.lora.target_parameters", Names, None, "experts to adapt, such as experts.gate_up_proj,experts.down_proj"
    ),
    Setting("tune.lora.trainable_token_indices", Integers, None, "token ids whose rows of the embedding are trained"),
    Setting("tune.hira.r", int, 32, "rank", range=AT_LEAST_1),
    Setting("tune.hira.hira_dropout", float, 0.0, "dropout on the updates' input", range=BELOW_1),
    Setting("tune.hira.target_modules", Targets, "all-linear", "all-linear, module names, or a regex over full names"),
    Setting("tune.hira.init_weights", str, "default", "initial values", ("default", "gaussian")),
    Setting("tune.hira.layers_to_transform", Integers, None, "indices of the layers with adapters; default: all"),
    Setting(
        "tune.hira.exclude_modules", Targets, None, "modules to leave out: names or a regex; wins over target_modules"
    ),
    Setting("tune.hira.modules_to_save", Names, None, "modules to train in full, such as embed_tokens,lm_head"),
    Setting("tune.miss.r", int, 64, "rows of the trained matrix of a module", range=AT_LEAST_1),
    Setting("tune.miss.miss_dropout", float, 0.0, "dropout on the updates' input", range=BELOW_1),
    Setting("tune.miss.target_modules", Targets, "all-linear", "all-linear, module names, or a regex over full names"),
    Setting("tune.miss.layers_to_transform", Integers, None, "indices of the layers with adapters; default: all"),
    Setting(
        "tune.miss.exclude_modules", Targets, None, "modules to leave out: names or a regex; wins over target_modules"
    ),
    Setting("tune.miss.modules_to_save", Names, None, "modules to train in full, such as embed_tokens,lm_head"),
    Setting("tune.ia3.target_modules", Targets, None, "module names or a regex; default: PEFT's for the family"),
    Setting("tune.ia3.feedforward_modules", Targets, None, "targets whose input is scaled instead of the output"),
    Setting(
        "tune.ia3.exclude_modules", Targets, None, "modules to leave out: names or a regex; wins over target_modules"
    ),
    Setting("tune.ia3.modules_to_save", Names, None, "modules to train in full, such as embed_tokens,lm_head"),
    Setting("tune.prompt_tuning.num_virtual_tokens", int, 20, "vectors before each row", range=ROWS),
    Setting("tune.prompt_tuning.init", str, "vocab", "rows of the embedding, or N(0, 1)", ("vocab", "random")),
    Setting("tune.last_n.layers", int, 2, "blocks from the top, trained with the final norm", range=AT_LEAST_1),
    Setting("tune.regex.pattern", str, ".*", "matches full HF names: model.layers.0.mlp.up_proj.weight"),
    #
    Setting("data.train", Paths, None, "files, directories or hub ids (required)"),
    Setting("data.weights", Numbers, None, "how often each source is drawn; default: by size", range=ALL_POSITIVE),
    Setting("data.eval", Paths, None, "held-out data, given as data.train is"),
    Setting("data.eval_fraction", float, 0.0, "share of data.train held out, chosen by content", range=BELOW_1),
    Setting("data.format", str, "auto", "how a row is read; auto: by its columns", FORMATS),
    Setting("data.columns", Columns, {}, "jaxtune's column names = the file's: prompt=question,completion=answer|text"),
    Setting("data.template", str, None, r"builds a text from the file's columns: 'Q: {question}\nA: {answer}'"),
    Setting("data.completion_from", str, None, "text after which training starts (data.format=text, data.template)"),
    Setting("data.prompt_from", str, None, "text after which training stops, up to the next data.completion_from"),
    Setting("data.system", str, None, "a system prompt for conversations that have none"),
    Setting("data.system_as_user", bool, False, "system messages go to the start of the user's first message"),
    Setting("data.date", str, None, "date that chat templates write, YYYY-MM-DD; default: when the run began"),
    Setting("data.roles", Columns, {}, "the file's role names = jaxtune's: customer=user,agent=assistant"),
    Setting("data.ignore", Names, None, "columns, and fields of messages, to leave out without an error"),
    Setting(
        "data.allow_left_out", Names, None, "what the template may drop of trained turns: thoughts, answers, calls"
    ),
    Setting("data.max_length", int, None, "tokens a row; default: the model's, at most 1024", range=TOKENS),
    Setting("data.overlength", str, "drop", "what happens to longer rows", ("drop", "truncate", "split")),
    Setting("data.packing", bool, False, "several rows in one sequence, which do not see each other"),
    Setting(
        "data.max_segments", int, None, "most rows in a sequence; up to 32, a Hopper can use cuDNN", range=AT_LEAST_1
    ),
    Setting("data.max_target_length", int, 128, "tokens of a target at most (seq2seq)", range=TOKENS),
    Setting("data.group_by_length", bool, False, "batch rows of similar length: less padding, a little less random"),
    Setting("data.canaries", Integers, None, "made-up secrets among the training rows, by how often each is repeated"),
    Setting("data.cache", bool, True, "keep tokenised rows on disk"),
    Setting("data.streaming", bool, False, "rows stay on disk, where they are more than memory; shuffled by block"),
    #
    Setting("objective.name", str, "causal_lm", "the task", TASKS),
    Setting("objective.problem_type", str, "auto", "auto: the model's, else one label for each text", PROBLEM_TYPES),
    Setting("objective.labels", Names, None, "names of the labels in order; default: the model's, else the data's"),
    Setting("objective.first_label", int, None, "number of the first label, where rows number the labels (0 or 1)"),
    Setting("objective.class_weights", ClassWeights, None, "weights of labels in the loss: balanced, or one each"),
    Setting("objective.pooling", str, "auto", "how token states become a text's; auto: the family's", POOLINGS),
    Setting("objective.loss", Names, ("sigmoid",), f"over pairs, one or several: {', '.join(answers.PAIR_LOSSES)}"),
    Setting("objective.loss_weights", Numbers, None, "of several losses; default: 1 each", range=ALL_POSITIVE),
    Setting(
        "objective.beta",
        float,
        None,
        "hold to the reference, or scale of the margin; default: the loss's",
        range=POSITIVE,
    ),
    Setting("objective.gamma", float, 0.5, "SimPO's target margin, in units of the reward", range=NOT_NEGATIVE),
    Setting("objective.label_smoothing", float, 0.0, "share of pairs that are the wrong way round", range=BELOW_1),
    Setting(
        "objective.sft_weight", float, None, "of the loss on chosen answers; default: orpo, cpo 1", range=NOT_NEGATIVE
    ),
    Setting("objective.desirable_weight", float, 1.0, "of good answers (kto)", range=POSITIVE),
    Setting("objective.undesirable_weight", float, 1.0, "of bad answers (kto)", range=POSITIVE),
    Setting(
        "objective.reference",
        str,
        "precomputed",
        "log-probabilities of the base: computed once and kept, or in each step under the adapters",
        ("precomputed", "live"),
    ),
    Setting("objective.share_prompt", bool, False, "with data.packing: a prompt is laid once for both answers"),
    Setting("objective.centering", float, 0.0, "keeps the scores of a pair around 0 (reward)", range=NOT_NEGATIVE),
    Setting("objective.z_loss", float, 0.0, "weight of the squared log partition function", range=NOT_NEGATIVE),
    Setting("objective.teacher", Path, None, "a model, run or adapter that a student learns from (distillation)"),
    Setting("objective.top_k", int, 0, "likeliest tokens of it, computed once; 0: it runs in the step", range=TOP_K),
    Setting("objective.divergence", str, "forward_kl", "of the student from its teacher", DIVERGENCES),
    Setting("objective.jsd_beta", float, 0.5, "the teacher's weight in the mixture of jsd", range=INSIDE_1),
    Setting("objective.temperature", float, None, "of distributions; default: the loss's, else 1", range=POSITIVE),
    Setting("objective.contrast", str, "infonce", "how vectors of texts are compared (embedding)", contrasts.CONTRASTS),
    Setting("objective.ranking", str, "binary", "how scores of documents are learnt (reranking)", RANKINGS),
    Setting("objective.margin", float, None, "between unlike texts; default: the loss's", range=NOT_NEGATIVE),
    Setting("objective.symmetric", bool, False, "infonce: also find the first text by the second"),
    Setting("objective.normalize", str, "auto", "divide vectors by their lengths; auto: as the model does", AUTO),
    Setting("objective.dense", int, None, "channels of a new dense layer above the pooling", range=AT_LEAST_1),
    Setting("objective.matryoshka", Integers, None, "widths of vectors that are trained together", range=ALL_POSITIVE),
    Setting("objective.adaptive_layers", bool, False, "the vectors of all lower layers are trained, too (embedding)"),
    Setting("objective.query_prefix", str, None, "stands before a row's first text; default: the model's prompt query"),
    Setting("objective.document_prefix", str, None, "stands before the others; default: the model's prompt document"),
    Setting("objective.ce_weight", float, 0.0, "share of the cross-entropy with the rows' tokens", range=BELOW_1),
    Setting("objective.lmbda", float, 0.0, "share of rows that the student answers itself (on-policy)", range=UP_TO_1),
    Setting("objective.draw_every", int, 1, "with lmbda: in every so many-th step", range=AT_LEAST_1),
    Setting("objective.max_new_tokens", int, 128, "of an answer that the student draws", range=AT_LEAST_1),
    #
    Setting("optim.name", str, "adamw", "the optimizer", tuple(optimizers.OPTIMIZERS)),
    Setting(
        "optim.lr",
        float,
        None,
        "peak rate; default: full 1e-5, lora 2e-4, head 1e-3; pairs, kto a tenth",
        range=POSITIVE,
    ),
    Setting(
        "optim.loraplus_lr_ratio", float, 1.0, "LoRA+: rate of B and of vectors, as a multiple of lr", range=POSITIVE
    ),
    Setting("optim.schedule", str, "cosine", "decay from lr to min_lr_ratio * lr", ("constant", "linear", "cosine")),
    Setting("optim.warmup", float, 0.03, "below 1: share of the steps; 1 or more: steps", range=SHARE_OR_STEPS),
    Setting("optim.min_lr_ratio", float, 0.0, "learning rate at the end, as a share of lr", range=UP_TO_1),
    Setting("optim.weight_decay", float, 0.0, "decoupled weight decay, on matrices only", range=NOT_NEGATIVE),
    Setting("optim.grad_clip", float, 1.0, "largest global norm of the gradient; 0: off", range=NOT_NEGATIVE),
    Setting("optim.b1", float, 0.9, _of("b1", "decay of the first moment"), range=BELOW_1),
    Setting("optim.b2", float, 0.999, _of("b2", "decay of the second moment"), range=BELOW_1),
    Setting("optim.eps", float, 1e-8, _of("eps", "added before a division"), range=POSITIVE),
    Setting("optim.momentum", float, None, _of("momentum", "decay of the velocity"), range=BELOW_1),
    Setting(
        *("optim.state", str, "float32", "how moments are kept; 8bit: by blocks of 256; host: in the host's memory"),
        choices=("float32", "8bit", "host"),
    ),
    Setting(
        *("optim.weights", str, "float32", "how trained weights are kept; bfloat16: rounded at random"),
        choices=("float32", "bfloat16"),
    ),
    #
    Setting("train.steps", int, None, "optimizer steps; give this or epochs", range=AT_LEAST_1),
    Setting("train.epochs", float, None, "passes over data.train; default: 1", range=POSITIVE),
    Setting("train.batch_size", int, 8, "rows in an optimizer step, over all devices", range=ROWS),
    Setting("train.grad_accum", int, None, "parts to split a batch into, to save memory; default: 1", range=AT_LEAST_1),
    Setting("train.micro_batch", MicroBatch, None, "rows of a part, instead of grad_accum; auto: as memory allows"),
    Setting("train.eval_every", int, 0, "steps between evaluations; 0: each epoch and at the end", range=NOT_NEGATIVE),
    Setting("train.eval_batches", int, 0, "batches in an evaluation; 0: all", range=NOT_NEGATIVE),
    Setting(
        "train.save_every", int, 0, "steps between checkpoints; 0: at evaluations and at the end", range=NOT_NEGATIVE
    ),
    Setting("train.keep", int, 2, "checkpoints kept beside the best", range=AT_LEAST_1),
    Setting("train.early_stop", int, 0, "evaluations without improvement before stopping; 0: off", range=NOT_NEGATIVE),
    Setting("train.best", str, "eval/loss", "metric of evaluations that decides which weights are the result"),
    Setting("train.cache_features", str, "auto", "compute once what lies below all trained layers", AUTO),
    Setting("train.cache_gib", float, 20.0, "GiB on disk that cached features of all runs may take", range=POSITIVE),
    Setting("train.seed", int, 0, "seed of the order of rows, dropout and initial values", range=SEED),
    #
    Setting("mesh.data", int, -1, "devices that split rows alone; -1: what the others leave", range=DEVICES),
    Setting("mesh.fsdp", int, 1, "devices that split rows, and matrices among them", range=DEVICES),
    Setting("mesh.model", int, 1, "devices that split heads, feed-forward width and vocabulary", range=DEVICES),
    Setting(
        *("mesh.frozen", str, "auto", "frozen matrices; auto: whole on each device if they fit, else split by fsdp"),
        choices=("auto", "whole", "split"),
    ),
    #
    Setting("log.every", int, 10, "steps between logged lines", range=AT_LEAST_1),
    Setting("log.tensorboard", bool, True, "write event files"),
    Setting("log.wandb", bool, False, "also log to Weights & Biases"),
    Setting("log.progress", bool, True, "show a progress bar and a plot of the losses on a terminal"),
    #
    Setting("evaluate.samples", int, 0, "held-out rows to continue at each evaluation", range=NOT_NEGATIVE),
    Setting("evaluate.prompts", Names, None, "texts to continue at each evaluation"),
    Setting("evaluate.metrics", Names, None, "scores of answers before and after training; see jaxtune eval"),
    Setting("evaluate.general", Paths, None, "text outside the tuning data, whose loss is logged at each evaluation"),
    Setting("evaluate.memory", int, 0, "training rows told from held-out ones at each evaluation", range=NOT_NEGATIVE),
    Setting("evaluate.canaries", bool, True, "exposure of data.canaries at each evaluation"),
    Setting("evaluate.known", Paths, None, "rows from jaxtune data --known, answered at each evaluation"),
    Setting("evaluate.max_new_tokens", int, 64, "tokens of a generated answer at most", range=AT_LEAST_1),
    Setting("evaluate.rows", int, 100, "held-out rows to generate for", range=AT_LEAST_1),
)
BY_PATH = {setting.path: setting for setting in SETTINGS}

REQUIRED = ("model.path", "data.train")


class Retired(NamedTuple):
    """A setting that is gone.

    Attributes:
        neutral: the value that changed nothing, which older config.json files hold.
        instead: what to do now.
        becomes: what another value is now, as (setting, value), so that older runs can be resumed.
    """

    neutral: Any
    instead: str
    becomes: tuple[str, Any] | None = None


RETIRED: dict[str, Retired] = {
    "model.unroll": Retired(1, "it was removed: it copied weights and was never faster"),
    "log.plot": Retired(True, "log.progress switches both bar and plot"),
    "evaluate.json": Retired(
        False,
        "write evaluate.metrics=json_valid,json_exact",
        ("evaluate.metrics", ["json_valid", "json_exact"]),
    ),
}

# Other tools' names of settings: only used to suggest jaxtune's, never accepted.
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

DEFAULT_LR = {name: row.lr for name, row in methods.ROWS.items()}


def default_lr(task: str) -> dict[str, float]:
    """The default rate of each method for a task."""
    share = TASKS[task].rate if task in TASKS else 1.0  # an unknown name is told elsewhere
    return {method: float(f"{share * rate:g}") for method, rate in DEFAULT_LR.items()}


# Defaults that follow from other settings: they replace None in the resolved config.
DERIVED: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "model.tokenizer": lambda values: values["model.path"],
    "optim.lr": lambda values: default_lr(values["objective.name"])[values["tune.method"]],
    "optim.momentum": lambda values: optimizers.defaults("momentum").get(values["optim.name"], 0.9),
    "objective.beta": answers.default_beta,
    "objective.sft_weight": answers.default_sft,
    "objective.temperature": contrasts.default_temperature,
    "objective.margin": contrasts.default_margin,
    "train.epochs": lambda values: 1.0 if values["train.steps"] is None else None,
    "train.micro_batch": lambda values: values["train.batch_size"] // (values["train.grad_accum"] or 1),
    "train.grad_accum": lambda values: (
        values["train.batch_size"] // values["train.micro_batch"] if isinstance(values["train.micro_batch"], int) else 1
    ),
}

# What may change when a run is resumed: how long, how often, and what is written; never what is computed.
RESUMABLE = frozenset(
    [
        *("train.steps", "train.epochs", "train.eval_every", "train.eval_batches", "train.early_stop"),
        *("train.save_every", "train.keep", "train.cache_features", "train.cache_gib"),
        *("data.cache", "mesh", "log", "evaluate"),
    ]
)


class Idle(NamedTuple):
    """Settings (or a section) that have no effect while `when` holds: an error if given, unless the value is in OFF."""

    paths: tuple[str, ...] | Callable[[Mapping[str, Any]], tuple[str, ...]]
    when: Callable[[Mapping[str, Any]], bool]
    because: str  # {a.b} stands for the value of setting a.b

    def at(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The settings of this rule that have no effect, given the values of all settings."""
        if not self.when(values):
            return ()
        return self.paths if isinstance(self.paths, tuple) else self.paths(values)


CONVERSATIONS = ("data.system", "data.date", "data.system_as_user", "data.roles", "data.allow_left_out")

OFF = (0, False, "auto", "none", {})


def no_eval_data(values: Mapping[str, Any]) -> bool:
    """Whether the values name no held-out data."""
    return not values["data.eval"] and not values["data.eval_fraction"]


IDLE = (
    Idle(lambda v: unread(v["objective.name"]), lambda v: True, "objective.name is {objective.name}"),
    Idle(answers.unread, lambda v: v["objective.name"] == "preference", "objective.loss is {objective.loss}"),
    Idle(contrasts.unread, lambda v: v["objective.name"] == "embedding", "objective.contrast is {objective.contrast}"),
    *(
        Idle((f"tune.{name}",), lambda v, name=name: v["tune.method"] != name, "tune.method is {tune.method}")
        for name, row in methods.ROWS.items()
        if methods.names(row.settings)
    ),
    Idle(("optim.loraplus_lr_ratio",), lambda v: v["tune.method"] != "lora", "tune.method is {tune.method}"),
    *(
        Idle(
            (f"optim.{s}",), lambda v, s=s: v["optim.name"] not in optimizers.defaults(s), "optim.name is {optim.name}"
        )
        for s in optimizers.SETTINGS
    ),
    Idle(
        ("optim.state",),
        lambda v: v["optim.name"] == "adafactor" or (v["optim.name"] == "sgd" and v["optim.momentum"] == 0),
        "optim.name={optim.name} keeps no moments of the weights' size",
    ),
    Idle(("optim.min_lr_ratio",), lambda v: v["optim.schedule"] == "constant", "optim.schedule is constant"),
    Idle(("data.max_segments",), lambda v: not v["data.packing"], "data.packing is off"),
    Idle(("data.group_by_length",), lambda v: v["data.packing"], "data.packing leaves nothing to pad"),
    Idle(("objective.share_prompt",), lambda v: not v["data.packing"], "data.packing is off"),
    Idle(("data.eval_fraction",), lambda v: v["data.eval"], "data.eval names the held-out data"),
    Idle(("data.weights",), lambda v: v["data.train"] and len(v["data.train"]) == 1, "data.train has one source"),
    Idle(("model.chat_template", *CONVERSATIONS), lambda v: v["data.format"] == "text", "data.format is text"),
    Idle(
        ("model.chat_template", *CONVERSATIONS, "data.ignore", "data.format", "data.columns"),
        lambda v: v["data.template"],
        "data.template builds a text from the file's own columns",
    ),
    Idle(
        ("data.completion_from",),
        lambda v: not v["data.template"] and v["data.format"] not in ("auto", "text"),
        "{data.format} rows name their completion",
    ),
    Idle(
        ("train.eval_every", "train.eval_batches", "train.early_stop", "train.best", "evaluate"),
        no_eval_data,
        "there is nothing to evaluate on: give data.eval or data.eval_fraction",
    ),
    Idle(
        ("objective.labels", "objective.first_label", "objective.class_weights"),
        lambda v: v["objective.problem_type"] == "regression",
        "objective.problem_type is regression",
    ),
    Idle(("mesh.frozen",), lambda v: v["mesh.fsdp"] == 1, "mesh.fsdp is 1"),
    Idle(("evaluate.canaries",), lambda v: not v["data.canaries"], "data.canaries puts no secrets into the data"),
    Idle(
        ("evaluate.rows",),
        lambda v: not (v["evaluate.metrics"] or v["evaluate.known"]),
        "evaluate.metrics and evaluate.known name none",
    ),
    Idle(
        ("evaluate.max_new_tokens",),
        lambda v: not (v["evaluate.metrics"] or v["evaluate.samples"] or v["evaluate.prompts"]),
        "evaluate.metrics, evaluate.samples and evaluate.prompts ask for no text",
    ),
    Idle(
        ("train.cache_gib",),
        lambda v: v["train.cache_features"] == "off" and not v["objective.top_k"],
        "train.cache_features is off",
    ),
    Idle(
        ("objective.jsd_beta",),
        lambda v: v["objective.divergence"] != "jsd",
        "objective.divergence is {objective.divergence}",
    ),
    Idle(
        ("objective.draw_every", "objective.max_new_tokens"),
        lambda v: not v["objective.lmbda"],
        "objective.lmbda is 0, so that the student draws no rows",
    ),
)
