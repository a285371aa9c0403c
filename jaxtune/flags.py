"""The flags of a command, and its `--help`.

`--config.section.key=value` is read by a small parser over the schema: `ml_collections.config_flags` can override only
what the file holds, takes `c,d` for the tuple `("c,d",)`, wants `--config` first and shows a traceback for a wrong key.
Nothing here imports jax.
"""

import textwrap
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from jaxtune.config import KINDS, REQUIRED, SECTIONS, SETTINGS, find_setting, load_file, namesakes, resolve
from jaxtune.errors import Help, UserError, nearest

if TYPE_CHECKING:
    from ml_collections import FrozenConfigDict


@dataclass(frozen=True)
class Flag:
    """A flag (or positional argument) of a command, besides the settings.

    type: str, int, float or Path (a leading ~ is expanded); bool for a switch; list for strings of a repeated flag.
    bare: the text it stands for without a value; None: it needs one.
    """

    doc: str
    type: type = str
    default: Any = None
    choices: tuple[str, ...] = ()
    required: bool = False
    bare: str | None = None


# Of every command that reads an adapter.
OF_ADAPTERS = {
    "base": Flag("directory or hub id of the adapter's base; default: the one that it names"),
    "allow-other-base": Flag("accept a base of another name than the adapter was trained on", bool, False),
}


def parse(
    argv: Sequence[str],
    flags: Mapping[str, Flag] | None = None,
    *,
    usage: str = "",
    required: Iterable[str] = REQUIRED,
    sweeps: bool = False,
) -> tuple["FrozenConfigDict", SimpleNamespace]:
    """Read the command line of a command that has a config.

    Args:
      argv: what follows the command's name.
      flags: name without dashes (`"workdir"`, `"dry-run"`) -> Flag.
      usage: the first lines of `--help`.
      required: settings that must be given.
      sweeps: whether `--sweep.section.key=v1,v2` are flags, too.

    Returns:
      (config, options): options has one attribute a flag (`options.dry_run`), and `config_file`, as given or None. With
      `sweeps` also `sweep`, path -> text, and `resolve`, which takes more settings as text and returns another config.

    Raises:
      Help: `--help` was given. Raised before ml_collections is imported.
      UserError: an unknown flag, a flag without value, and whatever `resolve` and `load_file` refuse.
    """
    options, settings = _scan(argv, dict(flags or {}), {}, usage, with_config=True, with_sweep=sweeps)
    overrides, source = load_file(options.config_file) if options.config_file else ({}, "the config")
    if sweeps:
        options.resolve = lambda more: resolve(overrides, settings | dict(more), source=source)
    return resolve(overrides, settings, source=source, required=required), options


def parse_options(
    argv: Sequence[str],
    flags: Mapping[str, Flag] | None = None,
    arguments: Mapping[str, Flag] | None = None,
    *,
    usage: str = "",
    settings: bool = False,
) -> SimpleNamespace:
    """Read the command line of a command without a config: `flags`, and positional `arguments` in their order.

    An argument of type list takes all the rest. With `settings`, `--config.section.key=value` are flags, too: the
    options have `settings`, path -> text. Raises as `parse` does.
    """
    options, given = _scan(argv, dict(flags or {}), dict(arguments or {}), usage, False, with_settings=settings)
    if settings:
        options.settings = given
    return options


def _scan(
    argv: Sequence[str],
    flags: dict[str, Flag],
    arguments: dict[str, Flag],
    usage: str,
    with_config: bool,
    with_sweep: bool = False,
    with_settings: bool = False,
) -> tuple[SimpleNamespace, dict[str, str]]:
    """Split argv into options and settings (path -> text)."""
    with_settings |= with_config
    if with_config:
        flags = {"config": Flag("a Python file with get_config(), or the config.json of a run"), **flags}
    if any(token in ("--help", "-h") for token in argv):
        raise Help(_command_help(usage, flags, arguments, with_settings))
    options: dict[str, Any] = {}
    settings: dict[str, str] = {}
    sweep: dict[str, str] = {}
    positionals: list[str] = []
    queue = deque(argv)
    while queue:
        token = queue.popleft()
        name = token.removeprefix("--").partition("=")[0].replace("_", "-")
        if not token.startswith("-") or token == "-":
            positionals.append(token)
        elif with_settings and token.startswith(("--config.", "--noconfig.")):
            path, text = _setting_text(token, queue)
            settings[path] = text
        elif with_sweep and token.startswith("--sweep."):
            head, equals, text = token.partition("=")
            path = head.removeprefix("--sweep.")
            if path in sweep:
                raise UserError(f"{head} is given twice")
            sweep[path] = text if equals else _next(head, queue)
        elif not token.startswith("--") or name not in flags:
            raise UserError(f"unknown flag {token.partition('=')[0]}.{_nearest_flag(name, flags, with_settings)}")
        elif flags[name].type is list:
            options.setdefault(name, []).append(_flag_text(token, flags[name], queue))
        elif name in options:
            raise UserError(f"--{name} is given twice")
        else:
            text = _flag_text(token, flags[name], queue)
            options[name] = _flag_value(f"--{name}={text}", flags[name], text)
    options |= _positionals(positionals, arguments)
    for name, flag in (flags | arguments).items():
        if flag.required and name not in options:
            raise UserError(f"{name if name in arguments else f'--{name}'} is missing: {flag.doc}")
        options.setdefault(name, flag.default)
    if with_config:
        options["config_file"] = options.pop("config")
    if with_sweep:
        options["sweep"] = sweep
    return SimpleNamespace(**{name.replace("-", "_"): value for name, value in options.items()}), settings


def _setting_text(token: str, queue: deque[str]) -> tuple[str, str]:
    """Read `--config.a.b=text`, `--config.a.b text`, and for a switch `--config.a.b` and `--noconfig.a.b`."""
    head, equals, text = token.partition("=")
    path = head.partition(".")[2]
    switch = find_setting(path, token).type is bool
    if token.startswith("--no"):
        if equals or not switch:
            raise UserError(f"{token}: --no negates true/false settings only, and takes no value")
        return path, "false"
    if equals:
        return path, text
    if switch and not (queue and queue[0].lower() in ("true", "false", "none")):
        return path, "true"
    return path, _next(token, queue)


def _flag_text(token: str, flag: Flag, queue: deque[str]) -> str:
    head, equals, text = token.partition("=")
    if equals:
        return text
    if flag.bare is not None:
        return flag.bare
    return "true" if flag.type is bool else _next(head, queue)


def _next(token: str, queue: deque[str]) -> str:
    if not queue or queue[0].startswith("--"):
        raise UserError(f"{token} needs a value: {token}=VALUE")
    return queue.popleft()


def _positionals(tokens: Sequence[str], arguments: Mapping[str, Flag]) -> dict[str, Any]:
    values, left = {}, deque(tokens)
    for name, argument in arguments.items():
        if left and argument.type is list:
            values[name] = list(left)
            left.clear()
        elif left:
            token = left.popleft()
            values[name] = _flag_value(token, argument, token)
    if left:
        hint = " Settings are given as --config.section.key=value." if not arguments else ""
        raise UserError(f"unexpected argument {left[0]!r}.{hint}")
    return values


def _flag_value(origin: str, flag: Flag, text: str) -> Any:
    kind = KINDS[flag.type]
    try:
        value = kind.from_text(text)
    except ValueError:
        raise UserError(f"{origin}: expected {kind.expected}") from None
    if flag.choices and value not in flag.choices:
        raise UserError(f"{origin}: choose from {', '.join(flag.choices)}.{nearest(value, flag.choices, n=1)}")
    return Path(value) if flag.type is Path else value


def _nearest_flag(name: str, flags: Mapping[str, Flag], with_config: bool) -> str:
    known = [*flags, "help"]
    same = namesakes(name) if with_config else []
    if same:
        return f" Did you mean {' or '.join(f'--config.{path}' for path in same)}?"
    close = nearest(name, known, n=1) and nearest(f"--{name}", [f"--{flag}" for flag in known], n=1)
    return f"{close} Flags: {', '.join(f'--{flag}' for flag in known)}{', --config.section.key' * with_config}."


# ------------------------------------------------------------------------------------------------- help of a command


def describe() -> str:
    """Return the schema as text: a block for each section; for each setting its type, default, meaning and choices."""
    blocks = []
    for section, meaning in SECTIONS.items():
        lines = [f"{section}: {meaning}"]
        for s in (s for s in SETTINGS if s.section == section):
            doc = s.doc + (f" [{' | '.join(s.choices)}]" if s.choices else "")
            lines.append(_row(s.key, KINDS[s.type].label, _shown(s.default), doc))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _command_help(usage: str, flags: Mapping[str, Flag], arguments: Mapping[str, Flag], with_config: bool) -> str:
    blocks = [usage] if usage else []
    if arguments:
        blocks.append("\n".join(["arguments", *(_row(name, "", "", a.doc) for name, a in arguments.items())]))
    lines = ["flags"]
    for name, flag in flags.items():
        label = "" if flag.type is bool else "str..." if flag.type is list else KINDS[flag.type].label
        doc = flag.doc + (f" [{' | '.join(flag.choices)}]" if flag.choices else "")
        lines.append(_row(f"--{name}", label, "" if flag.type is bool else _shown(flag.default), doc))
    blocks.append("\n".join([*lines, _row("--help", "", "", "show this and exit")]))
    if with_config:
        blocks.append(
            "settings: name, type, default, meaning. Give them as --config.section.key=value; they override the file.\n"
            "A switch is --config.data.packing or --noconfig.data.packing; none resets a setting to its default."
        )
        blocks.append(describe())
    return "\n\n".join(blocks)


def _shown(default: Any) -> str:
    """A default as the command line writes it."""
    if default is None or default == {}:
        return "-"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _row(name: str, kind: str, default: str, doc: str) -> str:
    head = f"  {name:<17} {kind:<9} {default:<11} "
    return textwrap.fill(doc, 110, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
