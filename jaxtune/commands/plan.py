"""`jaxtune plan`: what models and methods cost in memory and time, and whether a device holds them."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.errors import UserError, nearest
from jaxtune.flags import Flag, parse_options
from jaxtune.reading import read_json

if TYPE_CHECKING:
    from jaxtune.train.cost import Card

USAGE = """usage: jaxtune plan MODEL [MODEL ...] [--method=lora,full] [--gpu=NAME] [--memory=GiB] [--mesh=1x8x1] [...]

Shows what a training step takes before anything is loaded: parameters, bytes by part for each remat policy, operations
and time, the largest micro-batch and the widest sweep that fit, and what to change where it does not fit.

A MODEL is a directory or a hub id (only its config.json is read), a config FILE.py or the config.json of a run. Without
--gpu and --memory the plan is for this machine's device, and the step is compiled to get XLA's own memory plan;
otherwise memory is computed by a formula over what JAX's autodiff saves."""

FLAGS = {
    "method": Flag("methods to plan, comma-separated; default: the config's"),
    "gpu": Flag("a card to plan for: a name, or `list`"),
    "memory": Flag("GiB of a GPU to plan for", float),
    "mesh": Flag("devices that share the run, as mesh.data x mesh.fsdp x mesh.model: 1x8x1; default: the config's"),
    "link": Flag("GB/s between devices, each way; default: 450, as NVLink of an H100", float, 450.0),
    "batch": Flag("rows of a micro-batch; default: the config's", int),
    "length": Flag("tokens a row; default: the config's", int),
    "json": Flag("print JSON", bool, False),
}
ARGUMENTS = {"model": Flag("directories, hub ids, config files or config.json of runs", list, required=True)}


def main(argv: list[str]) -> None:
    if "--gpu=list" in argv:
        return _list_cards()
    options = parse_options(argv, FLAGS, ARGUMENTS, usage=USAGE)
    name, card = _device(options)
    for flag, least in (("batch", 1), ("length", 2)):
        value = getattr(options, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag}={value}: expected {least} or more")
    if options.link <= 0:
        raise UserError(f"--link={options.link:g}: expected GB/s above 0")
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=132)
    results = []
    for model in options.model:
        for cfg in _configs(model, options):
            results.append(_plan(cfg, model, name, card, options))
            if not options.json:
                _show(results[-1], console)
    if options.json:
        print(json.dumps(results, indent=2))


def _list_cards() -> None:
    from jaxtune.train.cost import CARDS, GIB

    for name, card in CARDS.items():
        print(
            f"{name:<10} {card.memory / GIB:6.1f} GiB {card.flops / 1e12:6.0f} TFLOP/s {card.bandwidth / 1e9:6.0f} GB/s"
        )


def _device(options: Any) -> tuple[str, "Card | None"]:
    """The name of the device to plan for, and its card; None: this machine's device."""
    from jaxtune.train.cost import CARDS, GIB, Card

    if options.memory is not None and options.memory <= 0:
        raise UserError(f"--memory={options.memory:g}: expected GiB above 0")
    if options.gpu is not None and options.gpu not in CARDS:
        raise UserError(
            f"--gpu={options.gpu}: unknown card.{nearest(options.gpu, CARDS)} Known: {', '.join(CARDS)}. For another, "
            "give its memory with --memory=GiB."
        )
    if options.gpu is None:
        if options.memory is None:
            return "this device", None
        return f"a GPU of {options.memory:g} GiB", Card(0.0, 0.0, int(options.memory * GIB))
    card = CARDS[options.gpu]
    return options.gpu, card if options.memory is None else card._replace(memory=int(options.memory * GIB))


def _configs(model: str, options: Any) -> Iterator[Any]:
    """The resolved config of each method."""
    from jaxtune.config import load_file, resolve

    head = model.partition(".py:")[0]
    if model.endswith(".py") or ".py:" in model or (Path(head).suffix == ".json" and not _is_hf_config(Path(head))):
        overrides, source = load_file(model)
    else:
        path = Path(model).expanduser()
        folder = str(path.parent) if path.is_file() else model
        overrides, source = {"model": {"path": folder}, "objective": _objective(folder)}, model
    settings = {} if options.length is None else {"data.max_length": str(options.length)}
    settings |= _mesh(options)
    for method in options.method.split(",") if options.method else [None]:
        chosen = {} if method is None else {"tune.method": method.strip()}
        yield resolve(overrides, settings | chosen | _micro(options), source=source, required=("model.path",))


def _objective(folder: str) -> dict[str, Any]:
    """The task of a model given without a config: that of its head; an encoder gets a classification of two labels."""
    from jaxtune import models
    from jaxtune.hf import load as hf
    from jaxtune.models.classifier import TOKEN, read_labels

    values = hf.read_config(hf.resolve(folder))
    labels = read_labels(values)
    if labels is None and models.build(values).continues:
        return {}
    name = "token_classification" if labels and labels.kind == TOKEN else "sequence_classification"
    if labels and labels.problem != "single_label_classification":
        return {"name": name, "problem_type": labels.problem}
    return {"name": name, "labels": labels.names if labels else ("LABEL_0", "LABEL_1")}


def _micro(options: Any) -> dict[str, str]:
    if options.batch is None:
        return {}
    return {"train.batch_size": str(options.batch), "train.grad_accum": "1", "train.micro_batch": "none"}


def _mesh(options: Any) -> dict[str, str]:
    if options.mesh is None:
        return {}
    sizes = options.mesh.split("x")
    if len(sizes) != 3 or not all(n.isdecimal() and int(n) for n in sizes):
        raise UserError(f"--mesh={options.mesh}: expected the devices along data, fsdp and model, as 1x8x1")
    return dict(zip(("mesh.data", "mesh.fsdp", "mesh.model"), sizes, strict=True))


def _is_hf_config(path: Path) -> bool:
    try:
        return "model_type" in read_json(path)
    except UserError:
        return False


def _plan(cfg: Any, model: str, name: str, card: "Card | None", options: Any) -> dict[str, Any]:
    """The plan of one config as JSON."""
    import jax

    from jaxtune import config
    from jaxtune.config.recipe import experiment
    from jaxtune.run import fit
    from jaxtune.train import cost
    from jaxtune.train.runtime import free_bytes

    backend = "gpu" if card else jax.default_backend()

    def opened(cfg):  # the id of padding costs nothing, so no tokenizer is needed
        return experiment(cfg, backend=backend, weights=False, pad_token_id=0)

    devices = math.prod(n for n in (cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.model) if n > 0)
    if cfg.train.micro_batch == "auto":
        on = card or cost.card_of(jax.devices()[0].device_kind, free_bytes())
        values, _ = fit.choose_micro_batch(opened(cfg), backend, on, devices)
        cfg = config.replaced(cfg, values)
    found = fit.plan(opened(cfg), model, name, card, devices)
    return found | {"wire_seconds": sum(found["wire_bytes"].values()) / (options.link * 1e9)}


def _show(found: dict[str, Any], console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    gib = 2**30
    share = 100 * found["trainable"] / found["parameters"]
    added = found["parameters"] - found["base"]
    table = Table(title=f"{found['model']}, {found['method']}", title_justify="left")
    parts = ("weights", "moments", "gradients", "kept", "logits", "total GiB")
    for column in ("remat", *parts, "fits", "rows", "sweep", "GFLOP/token", "s/step", "tokens/s"):
        table.add_column(column, justify="left" if column in ("remat", "fits") else "right")
    for policy, p in found["policies"].items():
        b = p["bytes"]
        state = [
            b["frozen"] + b["trainable"],
            b["optimizer"],
            b["gradients"],
            b["activations"] + b["layer"],
            b["logits"],
        ]
        seconds = p["seconds_a_step"]
        table.add_row(
            policy + (" *" if policy == found["remat"] else ""),
            *(f"{x / gib:.2f}" for x in (*state, b["total"])),
            "yes" if p["fits"] else "no",
            f"{p['largest_rows']:,}",
            f"{p['sweep_width']:,}",
            f"{p['flops_a_token'] / 1e9:.3g}",
            f"{seconds:.3g}" if seconds else "-",
            f"{p['tokens_a_second']:,.0f}" if seconds else "-",
        )
    console.print(table)
    total = found["total_bytes"] / gib
    host = found["policies"].get(found["remat"], {"bytes": {"host": 0}})["bytes"]["host"]
    lines = [
        f"{found['base']:,} parameters{f' + {added:,} of the adapter' if added else ''}, {found['trainable']:,} "
        f"({share:.3g}%) trainable; {found['dtype']}; "
        f"{found['rows']} rows x {found['length']} tokens, {found['micro_batches']} micro-batch(es)",
        f"{total:.2f} GiB by {found['source']}: {'fits' if found['fits'] else 'does not fit'} {found['device']} "
        f"({found['device_gib']:.1f} GiB)",
        *_said_of_devices(found),
        *([f"and {host / gib:.2f} GiB in the host's memory"] if host else []),
        "kept: activations for the backward pass; rows: the largest micro-batch; sweep: most runs in one step",
        *(f"  what to change: {remedy}" for remedy in found["remedies"]),
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)


def _said_of_devices(found: dict[str, Any]) -> list[str]:
    """What lies where, and what a device sends in a step."""
    if found["placement"] is None:
        return []
    sent = found["wire_bytes"]
    parts = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sent.items() if size)
    return [
        found["placement"],
        f"A device sends {sum(sent.values()) / 1e6:,.1f} MB a step ({parts}), {found['wire_seconds'] * 1e3:.2f} ms of "
        "link time; bytes and rows above are those of one device.",
    ]
