"""From a config file and the command line to a checked config; the settings themselves are in schema.py.

    load_file         runs `get_config()` of a config file, which returns overrides only; or reads a run's config.json
    resolve           merges defaults, file and command line, and reports everything that is wrong in one message
    check_resume      refuses to resume a run with a config that computes something else

Only this module and the command line (cli.py, commands/) know ConfigDict: below them, functions take plain arguments.
Nothing here imports jax, and ml_collections is imported only when a config is resolved: `--help` needs neither.
"""

import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtune.config.adapter import is_adapter, settings_of
from jaxtune.config.kinds import KINDS, Explained, is_mapping
from jaxtune.config.schema import (
    BY_PATH,
    DERIVED,
    IDLE,
    OFF,
    OTHER_NAMES,
    REQUIRED,
    RESUMABLE,
    RETIRED,
    SECTIONS,
    SETTINGS,
    Columns,
    Setting,
    default_lr,
    no_eval_data,
)
from jaxtune.errors import UserError, nearest
from jaxtune.objectives import answers, contrasts
from jaxtune.objectives.task import TASKS
from jaxtune.reading import parse_json

if TYPE_CHECKING:
    from ml_collections import ConfigDict, FrozenConfigDict


# ------------------------------------------------------------------------------------------------- resolving


class Given(NamedTuple):
    """A value that the user gave, and where: a file, or the flag as typed."""

    value: Any
    origin: str


def defaults() -> "ConfigDict":
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
      overrides: nested, with keys of the schema only. None resets a setting to its default. A setting that has no
        effect under the flags is reset, too.
      flags: setting path -> text as typed on the command line; wins over `overrides`; "none" resets.
      source: the name of `overrides` in error messages.
      required: settings that must be given.

    The result holds every setting; `optim.lr`, `train.epochs` and `model.tokenizer` hold the value that applies.
    `data.train` and `data.eval` are tuples, `tune.lora.target_modules` is a tuple of names, "all-linear" or a regex.

    Raises:
      UserError: one line for each problem.
    """
    from ml_collections import FrozenConfigDict

    return FrozenConfigDict(_nested(_derive(_values(_merged(overrides, flags, source, required)))))


def given(overrides: "ConfigDict | Mapping", flags: Mapping[str, str], *, source: str) -> dict[str, Any]:
    """Return path -> value of what `overrides` and `flags` set, without what the flags leave without effect.

    Raises as `resolve`.
    """
    return {path: g.value for path, g in _merged(overrides, flags, source, REQUIRED).items()}


def _merged(overrides: Any, flags: Mapping[str, str] | None, source: str, required: Iterable[str]) -> dict[str, Given]:
    """What is set, checked; see `resolve`."""
    problems: list[str] = []
    file = dict(_read_overrides(overrides or {}, source, problems))
    given = file | dict(_read_flags(flags or {}, problems))
    given, file = ({path: g for path, g in some.items() if g.value is not None} for some in (given, file))
    given |= _of_adapter(given, problems)
    values = _values(given)
    if not problems:
        lost = _overruled(given, file)
        given = {path: g for path, g in given.items() if path not in lost}
        values = _values(given)
        problems = [*_missing(values, required), *_conflicts(values), *_idle(values, given)]
    _refuse(problems)
    return given


def _of_adapter(given: Mapping[str, Given], problems: list[str]) -> dict[str, Given]:
    """Settings from an adapter in model.path: its base, method and settings; a different value for one is a problem.

    model.adapter together with a model.path that is the base (in any place) means the same.
    """
    named = next((p for p in ("model.path", "model.adapter") if p in given and is_adapter(given[p].value)), None)
    if named is None:
        if "model.adapter" in given:
            problems.append(
                f"{given['model.adapter'].origin}: model.adapter={given['model.adapter'].value} is no PEFT directory"
            )
        return {}
    adapter, found = given[named].value, {}
    for path, value in settings_of(adapter, own_base=named == "model.adapter").items():
        found[path] = Given(read_value(path, value, adapter), adapter)
        own = given.get(path)
        if own is not None and own.value != found[path].value and path not in ("model.path", "model.tokenizer"):
            problems.append(
                f"{own.origin}: {path}={own.value!r}, but the adapter in model.path, which is trained further, has "
                f"{found[path].value!r}; leave it out"
            )
    if "model.tokenizer" in given:
        found.pop("model.tokenizer", None)
    return found


def _values(given: Mapping[str, Given]) -> dict[str, Any]:
    return {s.path: given[s.path].value if s.path in given else s.default for s in SETTINGS}


def _overruled(given: Mapping[str, Given], file: Mapping[str, Given]) -> set[str]:
    """Settings of the file that lost their effect because the command line changed another one; they are reset.

    So `--config.tune.method=full` turns a LoRA config into one for full fine-tuning.
    """
    now, before = _values(given), _values(file)
    idle = {p for rule in IDLE for p in rule.at(now)} - {p for rule in IDLE for p in rule.at(before)}
    return {path for path, g in file.items() if _within(path, idle) and given.get(path) is g}


def notes(config: "ConfigDict") -> list[str]:
    """Return lines for the log on values that the user did not choose."""
    lines = []
    if config.optim.lr == default_lr(config.objective.name)[config.tune.method]:
        lines.append(f"optim.lr is {config.optim.lr:g}, the default for tune.method={config.tune.method}")
    if no_eval_data(dict(_flat(config))):
        lines.append("no held-out data: the last weights are taken as the best; data.eval_fraction=0.05 holds some out")
    return lines


def _derive(values: Mapping[str, Any]) -> dict[str, Any]:
    return values | {path: rule(values) for path, rule in DERIVED.items() if values[path] is None}


def _read_overrides(tree: Any, source: str, problems: list[str], prefix: str = "") -> Iterator[tuple[str, Given]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        try:
            if path in SECTIONS and is_mapping(value):
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
    """Check `raw` (text, if a flag is its origin) and return it in the setting's type."""
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
    """A hint where the only error is that a number or a switch is in quotes ("2e-5")."""
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
    if path in RETIRED:
        raise UserError(f"{origin}: there is no setting {path}: {RETIRED[path].instead}.")
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
    """A hint: settings with this key in another section, or the one that other tools call so; else the nearest."""
    same = namesakes(path)
    return f" Did you mean {' or '.join(map(repr, same))}?" if same else nearest(path, BY_PATH, n=1)


def namesakes(path: str) -> list[str]:
    """Paths of the settings whose last part is that of `path`, or that another library calls so."""
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
            "(--config.train.epochs=none unsets the one in the file)"
        )
    if values["train.grad_accum"] is not None and values["train.micro_batch"] is not None:
        yield (
            f"train.grad_accum={values['train.grad_accum']} and train.micro_batch={values['train.micro_batch']} both "
            "split a batch; keep one (--config.train.grad_accum=none unsets the one in the file)"
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
    warmup, steps = values["optim.warmup"], values["train.steps"]
    if steps is not None and warmup >= 1 and warmup > steps:
        yield f"optim.warmup={warmup:g} steps are more than train.steps={steps}; the rate would never be reached"
    labels = values["objective.labels"] or ()
    if twice := next((name for name in labels if labels.count(name) > 1), None):
        yield f"objective.labels has {twice!r} twice; each label has one name"
    if values["objective.name"] == "distillation" and values["objective.teacher"] is None:
        yield (
            "objective.name=distillation needs objective.teacher, the directory of the model to learn from: give "
            "--config.objective.teacher=DIR"
        )
    if values["objective.name"] == "distillation" and values["tune.method"] == "prompt_tuning":
        yield (
            "tune.method=prompt_tuning puts virtual tokens before each row, which objective.teacher does not know; "
            "choose another method for objective.name=distillation"
        )
    if values["objective.name"] == "distillation" and values["objective.lmbda"]:
        for path, why in (
            ("objective.top_k", "what is kept of the teacher is of the data's rows"),
            ("data.packing", "they have other lengths than the data's"),
            ("objective.ce_weight", "it would train the student on its own words"),
        ):
            if values[path]:
                yield f"{path} does not go with objective.lmbda, which draws rows from the student: {why}; choose one"
    if "data.format" not in TASKS[values["objective.name"]].settings and values["data.overlength"] == "split":
        yield (
            f"data.overlength=split has no meaning for {values['objective.name']}, whose labels or answers belong to "
            "whole rows; choose drop or truncate"
        )
    if values["data.streaming"]:
        yield from _streaming(values)
    yield from answers.problems(values)
    yield from contrasts.problems(values)
    if values["objective.name"] == "preference" and values["data.packing"] and values["data.overlength"] == "truncate":
        yield (
            "data.overlength=truncate has no meaning for packed pairs, of which both texts lie in one row; choose "
            "drop, or data.packing=false"
        )
    sources, weights = values["data.train"] or (), values["data.weights"] or ()
    if len(sources) > 1 and weights and len(weights) != len(sources):
        yield f"data.weights has {len(weights)} numbers and data.train {len(sources)} sources; give one weight a source"


def _streaming(values: Mapping[str, Any]) -> Iterator[str]:
    """What does not go with rows that are never all in memory."""
    if values["objective.name"] != "causal_lm":
        yield (
            f"data.streaming does not go with objective.name={values['objective.name']}, which needs all rows in "
            "memory; it is for causal_lm"
        )
    for path, why in (
        ("data.eval_fraction", "which sorts all rows: put the held-out rows into a file of their own, data.eval"),
        ("data.group_by_length", "which sorts all rows: data.packing leaves less padding"),
        ("data.canaries", "which are laid among rows in memory"),
        ("evaluate.known", "which looks each question up among the training rows"),
    ):
        if values[path]:
            yield f"{path} does not go with data.streaming: {why}"
    if not values["data.cache"]:
        yield "data.cache=false does not go with data.streaming, whose rows lie in the cache"
    if values["train.cache_features"] == "on":
        yield "train.cache_features=on does not go with data.streaming: features are kept of rows in memory"


def _idle(values: Mapping[str, Any], given: Mapping[str, Given]) -> Iterator[str]:
    for rule in IDLE:
        because = re.sub(r"\{([\w.]+)\}", lambda m: _shown(values[m[1]]), rule.because)
        for path, (value, origin) in given.items():
            if value not in OFF and _within(path, rule.at(values)):
                yield (
                    f"{origin}: {path} has no effect: {because}. Remove it"
                    + ("" if origin.startswith("--") else f", or unset it with --config.{path}=none")
                )


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


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
    """Return the config that `to_json` wrote; settings that are newer than the file get their defaults.

    Raises:
      UserError: not JSON, or not a config.
    """
    return resolve(_overrides_in_json(text, source), source=source, required=())


def changes(old: "ConfigDict", new: "ConfigDict") -> list[tuple[str, Any, Any]]:
    """Return `(path, old value, new value)` for each setting that differs, in the order of the schema."""
    return [(path, a, b) for (path, a), (_, b) in zip(_flat(old), _flat(new), strict=True) if a != b]


def check_resume(old: "ConfigDict", new: "ConfigDict") -> None:
    """Refuse to resume a run with a config that computes something else than `old` did.

    Raises:
      UserError: naming each difference outside RESUMABLE.
    """
    refused = [c for c in changes(old, new) if not _within(c[0], RESUMABLE)]
    if refused:
        lines = [f"{path}: {a!r} -> {b!r}" for path, a, b in refused]
        raise UserError(
            "the workdir holds a run with another config; nothing was changed:\n  "
            + "\n  ".join(lines)
            + "\nUndo the differences to resume that run, or give another --workdir."
        )


def replaced(config: "ConfigDict", values: Mapping[str, Any]) -> "FrozenConfigDict":
    """Return a resolved config with other values for some settings, path -> value; they are not checked again."""
    from ml_collections import FrozenConfigDict

    return FrozenConfigDict(_nested(dict(_flat(config)) | dict(values)))


def overrides(config: "ConfigDict") -> list[tuple[str, Any]]:
    """Return `(path, value)` of the settings that differ from the defaults, as a file would give them."""
    tree = _overrides_in_json(to_json(config), "config")
    return [(path, g.value) for path, g in _read_overrides(tree, "config", [])]


def _overrides_in_json(text: str, source: str) -> dict[str, Any]:
    """Return the values of a `config.json` that differ from the defaults, so that the others can be overridden freely.

    A derived value (the learning rate of its method, say) is dropped too: it follows the settings it was derived from.
    """
    tree = parse_json(text, source, halves=True)
    if not isinstance(tree, dict):
        raise UserError(f"{source}: expected an object of sections, as a run writes it; found {type(tree).__name__}")
    tree.pop("versions", None)
    for path, gone in RETIRED.items():
        section, _, key = path.rpartition(".")
        if not is_mapping(tree.get(section)) or key not in tree[section]:
            continue
        if tree[section][key] == gone.neutral:
            del tree[section][key]
        elif gone.becomes is not None:
            del tree[section][key]
            section, _, key = gone.becomes[0].rpartition(".")
            tree[section][key] = gone.becomes[1]
    problems: list[str] = []
    given = {path: g.value for path, g in _read_overrides(tree, source, problems)}
    _refuse(problems)
    values = {path: s.default if given.get(path) is None else given[path] for path, s in BY_PATH.items()}
    for path, rule in DERIVED.items():
        if values[path] == rule(values):
            values[path] = None
    idle = [p for rule in IDLE for p in rule.at(values)]  # defaults that have changed since the file was written
    return _nested(
        {path: v for path, v in values.items() if v != BY_PATH[path].default and not (v is None or _within(path, idle))}
    )


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
    if not is_mapping(overrides):
        found = type(overrides).__name__
        raise UserError(f"{path}: get_config() returned {found}; expected a ConfigDict of overrides")
    return overrides, str(path)


@contextmanager
def _user_code(path: Path) -> Iterator[None]:
    """Let a config file import its neighbours, undo changes to sys afterwards, and turn its errors into UserError."""
    folder = path.resolve().parent
    modules, write_bytecode = set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # after an edit within the same second Python would run the stale cache
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
        for name in set(sys.modules) - modules:  # another config's folder may have modules of the same names
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
