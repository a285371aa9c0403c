"""From a data file and a model to a proposed config: what is held out, and the settings that follow.

    held_out      an evaluation file beside the training file, or the share of rows to hold out
    propose       settings from the lengths of the rows and the size of the model
    write_config  the proposal as a Python file with a comment for each choice

`jaxtune.run.recognise` says how the rows are read. Nothing here imports jax.
"""

import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import config
from jaxtune.data.row_form import RowForm
from jaxtune.data.sources import read, splits
from jaxtune.errors import UserError
from jaxtune.objectives.task import TASKS
from jaxtune.reading import read_json
from jaxtune.run.recognise import Recognised

EVAL_WORDS = ("valid", "validation", "val", "dev", "eval", "test")

MULTIPLE = 32  # of tokens: max_length is rounded up to it
CORPUS_LENGTH = 1024  # tokens in a packed sequence
FULL_LIMIT = 1e9  # parameters at most for full fine-tuning on plain text
RANK = 16
LR_WIDTH = 2048
LR = {"lora": 2e-4, "full": 1e-5}  # for models at least LR_WIDTH wide


# ------------------------------------------------------------------------------------------ what is held out


class HeldOut(NamedTuple):
    """`eval` names a source, or `fraction` of the training rows is held out, or neither."""

    eval: str | None
    fraction: float
    notes: tuple[str, ...]


def held_out(data: str, layout: Recognised, rows: int) -> HeldOut:
    """Choose the evaluation set: an evaluation file beside `data` that reads the same way, else a share of `rows`."""
    notes = []
    for name in siblings(data):
        try:
            layout.reader(read(name))
        except UserError as error:
            why = re.split(r"\.(?:\s|$)", str(error))[0]
            notes.append(f"{Path(name).name} lies beside it but is not read the same way ({why})")
            continue
        if re.search(r"\btest\b", Path(name).name.replace("_", " ")):
            notes.append(f"{Path(name).name} serves as evaluation data: it chooses the best weights, so it is no test")
        return HeldOut(name, 0.0, tuple(notes))
    words = _words(Path(data).name)
    if set(words) & set(EVAL_WORDS) and "train" not in words:
        notes.append(f"{Path(data).name} is named like evaluation data, and would be trained on")
    fraction = eval_fraction(rows)
    if not fraction:
        notes.append(f"{rows} rows are too few to hold some out: there is no evaluation")
    return HeldOut(None, fraction, tuple(notes))


def siblings(data: str) -> list[str]:
    """Return the evaluation files beside a training file (the splits of a saved data set), validation before test."""
    path = Path(data).expanduser()
    if (path / "dataset_dict.json").is_file():
        known = read_json(path / "dataset_dict.json").get("splits", ())
        return [f"{data}:{word}" for word in EVAL_WORDS if word in known and "train" in known]
    if path.is_dir() and not (path / "state.json").is_file():
        found = splits(path)
        return [f"{data}:{word}" for word in EVAL_WORDS if word in found and "train" in found]
    words = _words(path.stem)
    if not path.is_file() or ("train" not in words and set(words) & set(EVAL_WORDS)):
        return []
    pattern = r"(?i)(?<![a-z])train(?![a-z])" if "train" in words else ".+"
    names = [str(Path(data).with_name(re.sub(pattern, word, path.stem, count=1) + path.suffix)) for word in EVAL_WORDS]
    return [name for name in names if Path(name).expanduser().is_file() and name != data]


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", name.lower())


def eval_fraction(rows: int) -> float:
    """Return 0.05, adjusted to hold out 20 to 1,000 rows; 0 if there are too few rows."""
    if rows < 20:
        return 0.0
    return float(f"{min(max(0.05, 20 / rows), 0.2, 1000 / rows):.1g}")


# ------------------------------------------------------------------------------------------ the settings


@dataclass(frozen=True)
class ModelFacts:
    """The facts on a model that decide the proposal.

    Attributes:
        shapes: of its tensors; None if the weights are not on this machine.
        narrowest: the smallest side of a matrix in its layers.
    """

    path: str
    tokenizer: str | None
    positions: int
    width: int
    shapes: tuple[tuple[int, ...], ...] | None
    has_template: bool
    narrowest: int = RANK

    @property
    def parameters(self) -> int | None:
        return None if self.shapes is None else sum(map(math.prod, self.shapes))

    @property
    def rank(self) -> int:
        """The rank to propose: at most the smallest side of an adapted matrix."""
        return min(RANK, self.narrowest)


class Choice(NamedTuple):
    """A setting, its value, and why."""

    path: str
    value: Any
    why: str = ""


@dataclass(frozen=True)
class Proposal:
    """Settings in the order of the schema, and notes for the user."""

    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = field(default=())

    def __getitem__(self, path: str) -> Any:
        return next(c.value for c in self.choices if c.path == path)

    def get(self, path: str, default: Any = None) -> Any:
        return next((c.value for c in self.choices if c.path == path), default)

    def changed(self, settings: Mapping[str, str]) -> "Proposal":
        """The proposal with settings as typed on a command line (path -> text), and without what then has no effect.

        Raises:
            UserError: a setting has no effect under the others, as in `config.resolve`.
        """
        if not settings:
            return self
        tree: dict[str, Any] = {}
        for choice in self.choices:
            if choice.path == "train.epochs" and "train.steps" in settings:
                continue
            *sections, key = choice.path.split(".")
            at = tree
            for name in sections:
                at = at.setdefault(name, {})
            at[key] = choice.value
        left = config.given(tree, settings, source="the proposal")
        ours = {c.path: c for c in self.choices if c.path not in settings}
        order = sorted(left, key=[s.path for s in config.SETTINGS].index)
        return replace(self, choices=tuple(ours.get(path, Choice(path, left[path])) for path in order))


def max_length(lengths: np.ndarray, positions: int) -> int:
    """Return the length that 99% of the rows have at most, rounded up, or the model's `positions` if that is less."""
    high = int(np.percentile(lengths, 99, method="inverted_cdf"))
    return min(-(-high // MULTIPLE) * MULTIPLE, positions)


def learning_rate(method: str, width: int, layout: Recognised | None = None) -> float:
    """Return the peak rate, to one digit: Adam's best rate goes with 1/width (Yang et al. 2022, arXiv:2203.03466).

    For losses over answers it is a smaller share, as their task has it.
    """
    share = _share(layout) if layout else 1.0
    return float(f"{share * LR[method] * max(1.0, LR_WIDTH / width):.1g}")


def propose(data: str, layout: Recognised, lengths: np.ndarray, model: ModelFacts) -> Proposal:
    """Choose the settings. `lengths` i[R] are the tokens of each training row, whole.

    Raises:
        UserError: no row fits the model.
    """
    corpus, labelled = layout.is_corpus, not layout.is_text  # labelled: longer rows are cut
    length = min(CORPUS_LENGTH, model.positions) if corpus else max_length(lengths, model.positions)
    long = int((lengths > length).sum())
    if long == len(lengths) and not corpus and not labelled:
        raise UserError(
            f"{data}: every row is longer than the {model.positions:,} positions of {model.path} (the shortest has "
            f"{int(lengths.min()):,} tokens). Shorten the rows or take another model."
        )
    kept = len(lengths) if corpus or labelled else len(lengths) - long
    held = held_out(data, layout, kept)
    notes = [*layout.notes, *_template_notes(layout, model), *held.notes]
    if long > 0.1 * len(lengths) and not corpus and not labelled:
        notes.append(
            f"{long / len(lengths):.0%} of the rows are longer than the model's {model.positions:,} positions and are "
            "dropped; data.overlength='truncate' would keep their beginnings"
        )
    full = corpus and model.parameters is not None and model.parameters <= FULL_LIMIT
    method = "full" if full else "lora"
    rows, form = round(lengths.sum() / length) if corpus else kept, layout.form or RowForm()
    choices = [
        Choice("model.path", model.path),
        *([Choice("model.tokenizer", model.tokenizer)] if model.tokenizer else []),
        *_method(method, corpus, model),
        Choice("data.train", _one_source(data)),
        *_evaluation(held),
        *([] if labelled or layout.form or layout.format == "template" else [Choice("data.format", layout.format)]),
        *([Choice("data.columns", dict(layout.columns), "jaxtune's name: the file's")] if layout.columns else []),
        *(
            [Choice("data.completion_from", layout.completion_from, "the text after it is trained")]
            if layout.completion_from
            else []
        ),
        *([Choice("data.prompt_from", layout.prompt_from, "up to here")] if layout.prompt_from else []),
        Choice("data.max_length", length, _length_reason(lengths, length, long, model.positions, layout)),
        *_corpus(corpus),
        *_labels(layout),
        *(Choice(*proposed) for proposed in form.proposes()),
        Choice("optim.lr", learning_rate(method, model.width, layout), _lr_reason(method, model.width, layout)),
        Choice("train.epochs", 3 if rows < 10_000 and not corpus else 1),
        Choice("train.batch_size", form.rows_a_step(rows), "rows a step; train.grad_accum splits it to save memory"),
    ]
    return Proposal(tuple(choices), tuple(notes))


def _template_notes(layout: Recognised, model: ModelFacts) -> list[str]:
    if layout.format in ("chat", "sharegpt"):
        if model.has_template:
            return ["rendered with the tokenizer's chat template; only the assistant's turns are trained"]
        return ["the tokenizer has no chat template: a plain one is used and exported with the model"]
    if layout.format not in ("text", "template") and not (layout.labels or layout.form) and model.has_template:
        return ["a row becomes a user's and an assistant's turn of the tokenizer's chat template"]
    return []


def _method(method: str, corpus: bool, model: ModelFacts) -> list[Choice]:
    if method == "full":
        return [Choice("tune.method", "full", f"all {model.parameters:,} weights: plain text, and a small model")]
    why = "adapters; 'full' tunes all weights, at about 16 bytes a parameter" if corpus else "adapters; or full, head"
    return [
        Choice("tune.method", "lora", why),
        Choice("tune.lora.r", model.rank),
        Choice("tune.lora.lora_alpha", 2 * model.rank),
        Choice("tune.lora.target_modules", "all-linear", 'or names: ("q_proj", "v_proj")'),
    ]


def _evaluation(held: HeldOut) -> list[Choice]:
    if held.eval:
        return [Choice("data.eval", _one_source(held.eval), "found beside the training data")]
    if held.fraction:
        return [Choice("data.eval_fraction", held.fraction, "of the training rows, chosen by their content")]
    return []


def _one_source(name: str) -> str | tuple[str]:
    """A comma separates sources, except in a tuple."""
    return (name,) if "," in name else name


def _corpus(corpus: bool) -> list[Choice]:
    if not corpus:
        return []
    return [
        Choice("data.overlength", "split", "longer texts become several rows"),
        Choice("data.packing", True, "several texts in one sequence, which do not see each other"),
    ]


def _paired(layout: Recognised) -> bool:
    return "text_pair" in layout.labels.columns


def _labels(layout: Recognised) -> list[Choice]:
    if layout.labels is None:
        return []
    each = "any number" if layout.labels.several else "one"
    of = "word" if layout.labels.per_token else "pair of texts" if _paired(layout) else "text"
    why = "a value" if layout.labels.value else f"{len(layout.labels.names)} labels, {each} for each {of}"
    return [
        Choice("data.overlength", "truncate", "a longer text keeps its label"),
        Choice("objective.name", layout.format, why),
        *([Choice("objective.problem_type", layout.problem)] if layout.problem else []),
        *([Choice("objective.labels", layout.labels.names, "the data's; the model's differ")] if layout.own else []),
    ]


def _length_reason(lengths: np.ndarray, length: int, long: int, positions: int, layout: Recognised) -> str:
    if layout.is_corpus:
        return f"tokens in a packed sequence; the model has {positions:,} positions"
    mean, longest = round(float(lengths.mean())), int(lengths.max())
    then = "dropped" if layout.is_text else "cut"
    dropped = f"{long:,} of {len(lengths):,} rows are longer and {then}" if long else "no row is longer"
    return f"rows have {mean:,} tokens on average, at most {longest:,}; {dropped}"


def _share(layout: Recognised) -> float:
    return TASKS[layout.format].rate if layout.form else 1.0


def _lr_reason(method: str, width: int, layout: Recognised) -> str:
    return f"{_share(layout) * LR[method]:g} from width {LR_WIDTH:,}, more for a narrower model (this: {width:,})"


# ------------------------------------------------------------------------------------------ the file


def write_config(proposal: Proposal, title: str, command: str, findings: Sequence[str]) -> str:
    """Return the proposal as the text of a config file.

    title, command, findings: for its docstring: a sentence, the command to run, and what was found in the data.
    """
    found = [textwrap.fill(line, 118, initial_indent="- ", subsequent_indent="  ") for line in findings]
    docstring = "\n".join([title, "", f"    {command}", "", *found])
    lines = [f'"""{_in_docstring(docstring)}\n"""', "", "from ml_collections import ConfigDict", "", ""]
    sections = {c.path.partition(".")[0]: {} for c in proposal.choices}
    if any(c.path.startswith("tune.lora.") for c in proposal.choices):
        sections["tune"] = {"lora": {}}
    lines += ["def get_config():", f"    config = ConfigDict({_literal(sections)})"]
    for _, choices in groupby(proposal.choices, key=lambda c: c.path.partition(".")[0]):
        lines.append("")
        for choice in choices:
            lines += _assignment(choice)
    return "\n".join([*lines, "", "    return config", ""])


def _assignment(choice: Choice) -> list[str]:
    line = f"    config.{choice.path} = {_literal(choice.value)}"
    why = " ".join(choice.why.split())
    if not why:
        return [line]
    whole = f"{line}  # {why}"
    return [whole] if len(whole) <= 120 else [f"    # {why}", line]


def _literal(value: Any) -> str:
    """Return Python source of a value, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_literal, value)) + ("," if len(value) == 1 else "") + ")"
    short = f"{value:g}" if isinstance(value, float) else repr(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def _in_docstring(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
