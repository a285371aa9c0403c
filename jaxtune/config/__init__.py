"""Configs: the schema, files, overrides and the checks before anything is loaded. No jax is imported here."""

from jaxtune.config.kinds import KINDS
from jaxtune.config.merge import (
    Given,
    changes,
    check_resume,
    defaults,
    find_setting,
    from_json,
    given,
    load_file,
    namesakes,
    notes,
    overrides,
    read_value,
    replaced,
    resolve,
    to_json,
)
from jaxtune.config.schema import ADAPTERS, BY_PATH, DEFAULT_LR, DERIVED, REQUIRED, SECTIONS, SETTINGS, Columns, Setting

__all__ = [
    "ADAPTERS",
    "BY_PATH",
    "DEFAULT_LR",
    "DERIVED",
    "KINDS",
    "REQUIRED",
    "SECTIONS",
    "SETTINGS",
    "Columns",
    "Given",
    "Setting",
    "changes",
    "check_resume",
    "defaults",
    "find_setting",
    "from_json",
    "given",
    "load_file",
    "namesakes",
    "notes",
    "overrides",
    "read_value",
    "replaced",
    "resolve",
    "to_json",
]
