"""How values of each type of the schema are read from the command line and checked."""

import math
import numbers
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config.schema import (
    Alphas,
    ClassWeights,
    Columns,
    Integers,
    MicroBatch,
    Names,
    Numbers,
    Paths,
    Ranks,
    Targets,
)


class Explained(ValueError):
    """A ValueError whose message is shown to the user."""


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
    if not is_mapping(value):
        raise ValueError
    pairs = {_text(k): _text(v) for k, v in value.items()}
    if any("." in k for k in pairs):
        raise ValueError
    return pairs


def _targets(value: Any) -> str | tuple[str, ...]:
    """Names become a tuple, even a single one, which as a regex would have to match a module's full name."""
    if value in ("", (), []):  # target_parameters alone
        return ()
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


def is_mapping(value: Any) -> bool:
    """ConfigDict is not a collections.abc.Mapping."""
    return isinstance(value, Mapping) or hasattr(value, "items")
