"""Scores of one answer against the expected one: `(prediction, reference) -> float | None`, in a registry.

None says that the metric does not apply to this row: its reference is of another kind. A new metric is a function in
`METRICS`; intervals, tests, groups and pages follow without further changes.
"""

import functools
import importlib.util
import inspect
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import reading, torchless
from jaxtune.errors import UserError, nearest
from jaxtune.evaluate.json_fields import NULL, parse_json, same_json

Score = Callable[[str, str], float | None]


class Metric(NamedTuple):
    """A score, with its presentation in tables.

    Attributes:
        label: its name in tables.
        score: `(prediction, reference) -> float | None`.
        better: 1 where more is better, -1 where less is.
        batch: in place of `score`, `(rows, answers) -> a score of each`, for what needs more of a row than its answer.
        share: lies between 0 and 1 and is shown in percent.
    """

    label: str
    score: Score
    better: int = 1
    share: bool = True
    batch: Callable[[Sequence[Any], Sequence[str | None]], list[float | None]] | None = None


# ---------------------------------------------------------------------------------------------------------------- text


def exact_match(prediction: str, reference: str) -> float:
    """1 where the texts are equal, apart from surrounding white space."""
    return float(prediction.strip() == reference.strip())


def squad_words(text: str) -> list[str]:
    """The words that SQuAD compares: lower case, without ASCII punctuation and English articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of the shares of words in common (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1)."""
    ours, theirs = squad_words(prediction), squad_words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004, ROUGE; aclanthology.org/W04-1013).

    Words are runs of letters and digits of any script; for English text those of Google's rouge_score, no stemming.
    """
    return float(_rouge().score(reference, prediction)["rougeL"].fmeasure)


@functools.cache
def _rouge() -> Any:
    torchless.unhide()  # it brings nltk, and that scipy.stats
    from rouge_score.rouge_scorer import RougeScorer

    class Words:
        def tokenize(self, text: str) -> list[str]:
            return re.findall(r"[^\W_]+", text.lower())

    return RougeScorer(["rougeL"], tokenizer=Words())


# ------------------------------------------------------------------------------------------------------------- numbers

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def final_number(text: str) -> Decimal | None:
    """The final number of an answer: the first after the last `####` (GSM8K's mark), else the last in the text."""
    marked = text.rpartition("####")
    found = _NUMBER.findall(marked[2])
    if not found:
        return None
    try:
        return Decimal((found[0] if marked[1] else found[-1]).replace(",", ""))
    except InvalidOperation:
        return None


def numeric(prediction: str, reference: str) -> float | None:
    """1 where both have the same final number; None where the reference has none (GSM8K: arXiv:2110.14168)."""
    expected = final_number(reference)
    return None if expected is None else float(final_number(prediction) == expected)


# ---------------------------------------------------------------------------------------------------------------- JSON


def json_valid(prediction: str, reference: str) -> float | None:
    """1 where the whole answer is a JSON text (RFC 8259) of the reference's kind, object or array; None for others."""
    expected = parse_json(reference)
    return float(type(parse_json(prediction)) is type(expected)) if isinstance(expected, dict | list) else None


def json_exact(prediction: str, reference: str) -> float | None:
    """1 where both hold the same JSON value; the order of an object's members does not matter."""
    expected = parse_json(reference)
    if not isinstance(expected, dict | list):
        return None
    return float(same_json(parse_json(prediction), expected))


def json_fields(prediction: str, reference: str) -> float | None:
    """Share of correct fields among those in either object; None where the reference is no object.

    Nested objects count by their innermost fields, lists as one value. A prediction that is no JSON object scores 0.
    """
    expected, got = parse_json(reference), parse_json(prediction)
    if not isinstance(expected, dict):
        return None
    if not isinstance(got, dict):
        return 0.0
    ours, theirs = _leaves(got), _leaves(expected)
    right = sum(path in ours and same_json(ours[path], value) for path, value in theirs.items())
    union = len(ours.keys() | theirs.keys())
    return right / union if union else 1.0


def _leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(value, dict) or (path and not value):
        return {path: value}
    return {k: v for key, inner in value.items() for k, v in _leaves(inner, (*path, key)).items()}


def schema_metric(file: Path) -> Metric:
    """Conformity with the JSON schema in `file`, of the draft that it names (default 2020-12).

    Raises:
        UserError: it is missing, not JSON, not a valid schema, or refers to something outside the file.
    """
    import jsonschema
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    if not file.is_file():
        raise UserError(f"--schema={file}: no such file.")
    schema = reading.parse_json(reading.read_text(file), f"--schema={file}")
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UserError(f"--schema={file}: not a JSON schema: at {error.json_path}: {error.message}.") from None
    validator = kind(schema, registry=Registry())  # an empty registry: nothing is fetched

    def conforms(prediction: str, reference: str) -> float:
        value = parse_json(prediction)
        try:
            return float(value is not None and validator.is_valid(None if value is NULL else value))
        except Unresolvable as error:
            raise UserError(f"--schema={file}: it refers to {error.ref!r}, which is not in the file.") from None

    return Metric("conforms to the schema", conforms)


# -------------------------------------------------------------------------------------------------------- the registry

METRICS: dict[str, Metric] = {
    "exact_match": Metric("exact match", exact_match),
    "token_f1": Metric("words in common (F1)", token_f1),
    "rouge_l": Metric("ROUGE-L", rouge_l),
    "numeric": Metric("right number", numeric),
    "json_valid": Metric("valid JSON", json_valid),
    "json_exact": Metric("every field right", json_exact),
    "json_fields": Metric("fields right", json_fields),
}


def choose(names: Sequence[str] | None, references: Sequence[str], flag: str = "--metrics") -> dict[str, Metric]:
    """The metrics by name; None: those for text, with those for numbers or JSON where every reference answer is such.

    Args:
        names: what was asked for, or None.
        references: the expected answers.
        flag: the option that gave `names`, for error messages.

    Raises:
        UserError: a name is unknown, or a metric that was asked for applies to no row.
    """
    if names is None:
        marked = all("####" in r or _NUMBER.fullmatch(r.strip()) for r in references)
        chosen = ["exact_match", "token_f1", "rouge_l"] + ["numeric"] * marked
        for name in ("json_valid", "json_exact", "json_fields"):
            chosen += [name] * all(METRICS[name].score(r, r) is not None for r in references)
        return {name: METRICS[name] for name in chosen}
    for name in names:
        if name not in METRICS:
            raise UserError(f"{flag}: unknown metric {name!r}.{nearest(name, METRICS)} Known: {', '.join(METRICS)}.")
        if all(METRICS[name].score(r, r) is None for r in references):
            what = "a number" if name == "numeric" else "JSON"
            raise UserError(
                f"{flag}={name}: it applies to no row, because no expected answer holds {what}; "
                f"the first is {references[0][:80]!r}."
            )
    return {name: METRICS[name] for name in names}


RIGHT = ("json_exact", "numeric", "exact_match")  # which metric says whether an answer is right: the first that fits


def rightness(references: Sequence[str]) -> Metric:
    """The metric that says whether an answer is right: it is 1."""
    fits = choose(None, references)
    return fits[next(name for name in RIGHT if name in fits)]


def load_scorer(given: str) -> tuple[str, Metric]:
    """A user's own metric from `FILE.py:FUNCTION`: `(prediction, reference) -> float | bool | None`, more is better.

    Raises:
        UserError: the file or the function is missing, or takes other arguments.
    """
    path, colon, name = given.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise UserError(f"--scorer={given}: expected FILE.py:FUNCTION.")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--scorer={given}: no such file: {file}.")
    spec = importlib.util.spec_from_file_location(f"jaxtune_scorer_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--scorer={given}: {file} cannot be imported: {type(error).__name__}: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"--scorer={given}: {file} has no function {name!r}.{nearest(name, functions)}")
    try:
        inspect.signature(function).bind("", "")
    except TypeError:
        raise UserError(f"--scorer={given}: {name} must take (prediction, reference).") from None

    def score(prediction: str, reference: str) -> float | None:
        try:
            value = function(prediction, reference)
        except Exception as error:
            raise UserError(
                f"--scorer={given}: {type(error).__name__}: {error}; the answer: {prediction[:80]!r}."
            ) from (error)
        if value is None:
            return None
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"--scorer={given}: expected a finite number or None, found {value!r}.")
        return value if isinstance(value, bool) else float(value)

    return name, Metric(name.replace("_", " "), score, share=False)
