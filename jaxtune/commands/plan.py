"""`jaxtune plan`: what models and methods cost in memory and time, and whether a device holds them."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.cli import Flag, parse_options
from jaxtune.errors import UserError, nearest

if TYPE_CHECKING:
    from jaxtune.train.cost import Card, Cost, Setup

USAGE = """usage: jaxtune plan MODEL [MODEL ...] [--method=lora,full] [--gpu=NAME] [--memory=GiB] [...]

Say what a training step takes before anything is loaded: parameters, bytes by part for each remat policy, operations
and time, the largest micro-batch and the widest sweep that fit, and what to change where it does not fit.

A MODEL is a directory or a hub id (only its config.json is read), a config FILE.py or the config.json of a run. Without
--gpu and --memory the device at hand is planned for, and the step is compiled to have XLA's own plan of its memory;
otherwise the memory is a formula over what JAX's autodiff saves."""

FLAGS = {
    "method": Flag("methods to plan, comma-separated; default: the config's"),
    "gpu": Flag("a card to plan for: a name, or `list`"),
    "memory": Flag("GiB of a GPU to plan for", float),
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
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=132)
    results = []
    for model in options.model:
        for cfg in _configs(model, options):
            results.append(_plan(cfg, model, name, card))
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
    """The name of what is planned for, and its card; None: the device at hand."""
    from jaxtune.train.cost import CARDS, GIB, Card

    if options.memory is not None and options.memory <= 0:
        raise UserError(f"--memory={options.memory:g}: expected GiB above 0")
    if options.gpu is not None and options.gpu not in CARDS:
        raise UserError(
            f"--gpu={options.gpu}: unknown card.{nearest(options.gpu, CARDS)} Known: {', '.join(CARDS)}. For another "
            "give its --memory."
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
    for method in options.method.split(",") if options.method else [None]:
        chosen = {} if method is None else {"tune.method": method.strip()}
        yield resolve(overrides, settings | chosen | _micro(options), source=source, required=("model.path",))


def _objective(folder: str) -> dict[str, Any]:
    """The task of a model that is named without a config: that of its head; an encoder's is taken for two classes."""
    from jaxtune import models
    from jaxtune.hf import load as hf
    from jaxtune.models.classifier import TOKEN, read_labels

    values = hf.read_config(hf.resolve(folder))
    labels = read_labels(values)
    if labels is None and models.auto_class(models.build(values)) == "AutoModelForCausalLM":
        return {}
    name = "token_classification" if labels and labels.kind == TOKEN else "sequence_classification"
    if labels and labels.problem != "single_label_classification":
        return {"name": name, "problem_type": labels.problem}
    return {"name": name, "labels": labels.names if labels else ("LABEL_0", "LABEL_1")}


def _micro(options: Any) -> dict[str, str]:
    if options.batch is None:
        return {}
    return {"train.batch_size": str(options.batch), "train.grad_accum": "1", "train.micro_batch": "none"}


def _is_hf_config(path: Path) -> bool:
    try:
        return "model_type" in json.loads(path.read_text())
    except (OSError, ValueError):
        return False


def _setup(cfg: Any, backend: str, module: Any = None) -> "Setup":
    """What a config trains, on a CPU or a GPU; `module`: its model, if it is there already."""
    import jax
    import jax.numpy as jnp

    from jaxtune.hf import load as hf
    from jaxtune.methods.table import tune
    from jaxtune.run import job
    from jaxtune.run.tasks import open_task
    from jaxtune.train import cost as plan

    dtype = cfg.model.dtype
    if dtype == "auto":
        dtype = "float32" if backend == "cpu" else "bfloat16"
    if module is None:
        fields = {"attention": cfg.model.attention, "remat": cfg.model.remat, "unroll": cfg.model.unroll}
        values = hf.read_config(hf.resolve(cfg.model.path))
        if values.get("pad_token_id") is None:
            values |= {"pad_token_id": 0}  # which id it is costs nothing, and no tokenizer need be there to name it
        module = open_task(cfg, values, dtype=jnp.dtype(dtype), **fields).module
    key = jax.random.fold_in(jax.random.key(cfg.train.seed), 1)
    return plan.Setup(
        module=module,
        method=lambda params: tune(cfg.tune.method, params, key, module, job.method_settings(cfg)),
        tx=job.make_tx(cfg, job.make_shape(cfg, 100)),
        rows=cfg.train.batch_size // cfg.train.grad_accum,
        length=job.max_length(cfg, module),
        micros=cfg.train.grad_accum,
        packed=cfg.data.packing,
        z_loss=cfg.objective.z_loss,
        backend=backend,
        quantization=cfg.model.quantization,
    )


def _plan(cfg: Any, model: str, name: str, card: "Card | None") -> dict[str, Any]:
    """The plan of one config as JSON."""
    import jax

    from jaxtune.run import job
    from jaxtune.train import cost as plan

    backend = "gpu" if card else jax.default_backend()
    memory = card.memory if card else job.free_bytes()
    if cfg.train.micro_batch == "auto":
        cfg, _ = _choose(cfg, _setup(cfg, backend), card or plan.card_of(jax.devices()[0].device_kind, memory))
    setup = _setup(cfg, backend)
    known = plan.shapes(setup)
    if not known.counts.trainable:
        raise UserError(f"{model}: nothing is left to train with tune.method={cfg.tune.method}.")
    rows, policies = setup.rows, _policies(setup, known)
    cost = policies[cfg.model.remat]
    total, source = (
        cost.bytes(rows).total,
        "formula: arguments, gradients, what autodiff saves, one layer or the logits",
    )
    if card is None:
        total, source = plan.compiled(setup, known), "XLA's plan of the compiled step"
    fits = plan.fits(total, memory)
    return {
        "model": model,
        "method": cfg.tune.method,
        "device": name,
        "device_gib": round(memory / plan.GIB, 2),
        "parameters": known.counts.all,
        "trainable": known.counts.trainable,
        "dtype": str(setup.module.dtype),
        "rows": rows,
        "length": setup.length,
        "micro_batches": setup.micros,
        "remat": cfg.model.remat,
        "total_bytes": total,
        "source": source,
        "fits": fits,
        "policies": {policy: _costs(c, rows, memory, card) for policy, c in policies.items()},
        "remedies": [] if fits else list(_remedies(cfg, setup, policies, memory))[:3],
    }


def _policies(setup: "Setup", known: Any) -> dict[str, "Cost"]:
    """The cost of each remat policy."""
    from jaxtune.train import cost as plan

    everything = plan.saved_by(setup, known, "everything")
    return {
        policy: plan.measure(replace(setup, module=setup.module.clone(remat=policy)), known, everything)
        for policy in plan.POLICIES
    }


def _choose(cfg: Any, setup: "Setup", card: "Card", devices: int = 1) -> tuple[Any, str]:
    """The config with the micro-batch and remat policy that are fastest on a card, and why in words.

    Raises:
        UserError: no part of a batch fits.
    """
    from jaxtune.config import replaced
    from jaxtune.train import cost as plan

    batch = cfg.train.batch_size
    if batch % devices:
        raise UserError(f"train.batch_size={batch} does not divide over {devices} devices; choose a multiple of them.")
    policies = _policies(setup, plan.shapes(setup))
    free = cfg.model.remat == "none"  # otherwise it was asked for
    open_ = policies if free else {cfg.model.remat: policies[cfg.model.remat]}
    choice = plan.choose_micro_batch(open_, batch // devices, card.memory, card)
    gib = card.memory / plan.GIB
    if choice is None:
        least = policies["full"].split(batch // devices).bytes(1).total / plan.GIB
        ways = "\n  ".join(list(_remedies(cfg, replace(setup, rows=batch // devices), policies, card.memory))[:3])
        raise UserError(
            f"train.micro_batch=auto: not even one row of {setup.length} tokens at a time fits the device: with "
            f"model.remat=full it takes {least:.2f} of {gib:.2f} GiB (by formula, see `jaxtune plan`). The cheapest "
            f"remedies:\n  {ways}"
        )
    rows, parts = choice.rows * devices, batch // devices // choice.rows
    total = policies[choice.policy].split(parts).bytes(choice.rows).total / plan.GIB
    said = f"train.micro_batch={rows} of {batch} rows and model.remat={choice.policy}: {total:.2f} of {gib:.2f} GiB"
    if (rows, choice.policy) == (batch, next(iter(open_))):
        said += ", by formula; nothing has to be saved"
    else:
        most = open_[next(iter(open_))].largest(card.memory)
        said += f", by formula, and the fastest that fits; {next(iter(open_))} would hold {most} rows a device"
    values = {"train.micro_batch": rows, "train.grad_accum": parts, "model.remat": choice.policy}
    return replaced(cfg, values), said


def settle(cfg: Any, model: Any, data: Any) -> tuple[Any, str]:
    """`_choose` for the devices at hand and the rows that were read, before anything is loaded or compiled."""
    import jax

    from jaxtune.run import job
    from jaxtune.train import cost as plan

    longest = max(int(rows.length.max()) for rows in data.train) + len(data.prefix)
    length = data.length if cfg.data.packing else min(data.length, -(-longest // 64) * 64)
    setup = replace(_setup(cfg, jax.default_backend(), model.module), length=length)
    card = plan.card_of(jax.devices()[0].device_kind, job.free_bytes())
    return _choose(cfg, setup, card, len(jax.devices()))


def settled(cfg: Any, workdir: Path | None) -> Any:
    """The config as the run in `workdir` has fixed it, if there is one."""
    from jaxtune import config

    file = None if workdir is None else workdir / "config.json"
    if cfg.train.micro_batch != "auto" or file is None or not file.exists():
        return cfg
    before = config.from_json(file.read_text(), str(file))
    values = {"train.micro_batch": before.train.micro_batch, "train.grad_accum": before.train.grad_accum}
    return config.replaced(cfg, values | ({"model.remat": before.model.remat} if cfg.model.remat == "none" else {}))


def _costs(cost: "Cost", rows: int, memory: int, card: "Card | None") -> dict[str, Any]:
    from jaxtune.train import cost as plan

    parts = cost.bytes(rows)
    seconds = cost.seconds(rows, card) if card and card.flops else None
    tokens = rows * cost.setup.length * cost.setup.micros
    return {
        "bytes": parts._asdict() | {"total": parts.total},
        "fits": plan.fits(parts.total, memory),
        "largest_rows": cost.largest(memory),
        "sweep_width": cost.widest(rows, memory),
        "flops_a_token": cost.flops / cost.setup.length,
        "seconds_a_step": seconds,
        "tokens_a_second": seconds and tokens / seconds,
    }


def _remedies(cfg: Any, setup: "Setup", policies: dict[str, "Cost"], memory: int) -> Iterator[str]:
    """What makes it fit, the cheapest first; each was measured."""
    import jax
    import jax.numpy as jnp

    from jaxtune.config import ADAPTERS
    from jaxtune.methods.table import tune
    from jaxtune.train import cost as plan

    now, rows = policies[cfg.model.remat], setup.rows
    if most := _divisor(cfg.train.batch_size, now.largest(memory)):
        yield f"--config.train.grad_accum={cfg.train.batch_size // most} ({most} rows at a time, the same result)"
    order = [p for p in plan.POLICIES if plan.POLICIES.index(p) > plan.POLICIES.index(cfg.model.remat)]
    for policy in order:
        if plan.fits(policies[policy].bytes(rows).total, memory):
            slower = policies[policy].flops / now.flops - 1
            yield f"--config.model.remat={policy} (the same result, {slower:.0%} more operations)"
            break
    else:
        if order and (most := _divisor(cfg.train.batch_size, policies["full"].largest(memory))):
            parts = cfg.train.batch_size // most
            yield f"--config.model.remat=full --config.train.grad_accum={parts} (the same result, {most} rows a part)"
    leanest = replace(setup, rows=1, micros=1, module=setup.module.clone(remat="full"))
    if setup.module.dtype == jnp.float32:
        half = plan.measure(replace(leanest, module=leanest.module.clone(dtype=jnp.dtype(jnp.bfloat16))))
        if most := half.largest(memory):
            yield f"--config.model.dtype=bfloat16 --config.model.remat=full (up to {most} rows at a time)"
    lora = replace(leanest, method=lambda params: tune("lora", params, jax.random.key(0), setup.module, {}))
    for flag, leaner, helps in (
        ("tune.method=lora", lora, cfg.tune.method not in ADAPTERS),
        ("model.quantization=nf4", replace(leanest, quantization="nf4"), cfg.tune.method in ADAPTERS),
    ):
        with suppress(UserError):  # a body that cannot be quantised, or has no matrix to adapt
            if helps and setup.quantization == "none" and (most := plan.measure(leaner).largest(memory)):
                yield f"--config.{flag} --config.model.remat=full (up to {most} rows at a time)"
    short = replace(leanest, length=max(16, setup.length // 2))
    if most := plan.measure(short).largest(memory):
        yield f"--config.data.max_length={short.length} --config.model.remat=full (up to {most} rows at a time)"
    need = now.bytes(rows).total
    cards = sorted((c.memory, name) for name, c in plan.CARDS.items() if plan.fits(need, c.memory))
    if cards:
        yield f"a larger card: {cards[0][1]} ({cards[0][0] / plan.GIB:.0f} GiB)"
    else:
        yield f"no card of the list holds {need / plan.GIB:.0f} GiB: a smaller model, or a method that trains less"


def _divisor(batch: int, most: int) -> int:
    """The largest divisor of a batch up to `most`; 0: none."""
    return next((n for n in range(min(batch, most), 0, -1) if batch % n == 0), 0)


def _show(found: dict[str, Any], console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    gib = 2**30
    share = 100 * found["trainable"] / found["parameters"]
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
    lines = [
        f"{found['parameters']:,} parameters, {found['trainable']:,} ({share:.3g}%) trainable; {found['dtype']}; "
        f"{found['rows']} rows x {found['length']} tokens, {found['micro_batches']} micro-batch(es)",
        f"{total:.2f} GiB by {found['source']}: {'fits' if found['fits'] else 'does not fit'} {found['device']} "
        f"({found['device_gib']:.1f} GiB)",
        "kept: activations for the backward pass; rows: the largest micro-batch; sweep: the most runs in one step",
        *(f"  what to change: {remedy}" for remedy in found["remedies"]),
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)
