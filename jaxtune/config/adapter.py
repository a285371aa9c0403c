"""model.path=ADAPTER trains an adapter further: its directory gives the base, the method and the settings."""

from pathlib import Path
from typing import Any

from jaxtune.config.schema import BY_PATH
from jaxtune.errors import UserError
from jaxtune.reading import read_json

_METHODS = {"LORA": "lora", "HIRA": "hira", "MISS": "miss", "IA3": "ia3", "PROMPT_TUNING": "prompt_tuning"}
_TASKS = {"SequenceClassification": "sequence_classification", "TokenClassification": "token_classification"}


def is_adapter(path: Any) -> bool:
    """Whether a path is that of a PEFT directory."""
    return isinstance(path, str) and (Path(path).expanduser() / "adapter_config.json").is_file()


def settings_of(path: str, *, own_base: bool = False) -> dict[str, Any]:
    """The settings that continue the training of an adapter: setting path -> value, as a config file would give them.

    Args:
        path: a PEFT directory.
        own_base: the caller has a base already, so the adapter need not name one.

    Raises:
        UserError: its directory names no base, or it is of a type or has a setting that jaxtune does not train.
    """
    folder = Path(path).expanduser()
    config = read_json(folder / "adapter_config.json")
    where, base, kind = f"model.path={path}", config.get("base_model_name_or_path"), config.get("peft_type")
    if not own_base and (not isinstance(base, str) or not base):
        raise UserError(f"{where}: the adapter does not name its base; set model.path to the base and model.adapter.")
    if not isinstance(kind, str) or kind not in _METHODS:
        raise UserError(f"{where}: an adapter of type {kind!r} is not trained; expected one of {', '.join(_METHODS)}.")
    if config.get("layers_pattern"):
        raise UserError(f"{where}: layers_pattern={config['layers_pattern']!r} is not trained further.")
    method = _METHODS[kind]
    found = {"model.adapter": path, "tune.method": method} | ({} if own_base else {"model.path": base})
    if (folder / "tokenizer_config.json").is_file():
        found["model.tokenizer"] = path
    for setting in (s for s in BY_PATH if s.startswith(f"tune.{method}.")):
        name = setting.rpartition(".")[2]
        value = config.get(name)
        if name == "trainable_token_indices" and isinstance(value, dict):
            if len(value) > 1 or any("head" in key or key.endswith("embed_out") for key in value):
                raise UserError(
                    f"{where}: {name}={value!r} has rows of the output head, which are not trained further."
                )
            value = next(iter(value.values()), None)
        if name not in ("init", "init_lora_weights", "init_weights") and value not in (None, [], {}):
            found[setting] = value
    return found | _labels(folder)


def _labels(folder: Path) -> dict[str, Any]:
    """The objective of an adapter with a label head, which `export_adapter` stored beside it."""
    if not (folder / "config.json").is_file():
        return {}
    config = read_json(folder / "config.json")
    names = config.get("id2label")
    classes = config.get("architectures")
    classes = classes if isinstance(classes, list) else []
    task = next((t for kind, t in _TASKS.items() for c in classes if str(c).endswith(f"For{kind}")), None)
    if task is None or not isinstance(names, dict):
        return {}
    if wrong := set(map(str, range(len(names)))) ^ names.keys():
        raise UserError(f"{folder}/config.json: id2label has no number for each label from 0 on: {min(wrong)!r}.")
    found = {"objective.name": task}
    if config.get("problem_type") != "regression":
        found["objective.labels"] = [names[key] for key in sorted(names, key=int)]
    if task == "sequence_classification" and config.get("problem_type"):
        found["objective.problem_type"] = config["problem_type"]
    if config.get("classifier_pooling"):
        found["objective.pooling"] = config["classifier_pooling"]
    return found
