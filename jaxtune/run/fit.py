"""Whether a run fits a device, and what to change if it does not; `jaxtune.train.cost` computes each remedy's cost."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.errors import RunFailed, UserError
from jaxtune.methods.table import tune
from jaxtune.run import devices
from jaxtune.run.experiment import Data, Experiment
from jaxtune.train import cost
from jaxtune.train.cost import GIB, Card, Cost, fits
from jaxtune.train.parallel import check_rows, row_parts
from jaxtune.train.recipe import Recipe, compiled_bytes
from jaxtune.train.runtime import free_bytes, out_of_memory


def plan(experiment: Experiment, model: str, device: str, card: Card | None, count: int = 1) -> dict[str, Any]:
    """Return what a step costs and whether it fits, as JSON.

    Args:
        experiment: opened for the backend of the device.
        model: its name in the plan.
        device: its name in the plan.
        card: of the device; None: this machine's, for which the step is compiled.
        count: how many devices the mesh has. The bytes are those of one, and so are the rows.

    Raises:
        UserError: nothing is left to train, or the mesh does not divide the devices, the rows or the model.
    """
    recipe, backend = experiment.recipe, "gpu" if card else jax.default_backend()
    memory = card.memory if card else free_bytes()
    counts = recipe.abstract.counts
    sizes, placed = devices.placement(experiment, count, lambda: memory, backend)
    check_rows(recipe.batch.rows, sizes)
    rows, policies = recipe.batch.rows // row_parts(sizes), cost.by_policy(recipe, backend)
    policies = {name: cost.on_mesh(found, recipe.abstract, sizes) for name, found in policies.items()}
    if card is None and count == 1:
        total, source = compiled_bytes([recipe], alone=True), "XLA's plan of the compiled step"
    else:
        total = policies[recipe.module.remat].bytes(rows).total
        source = "formula: arguments, gradients, what autodiff saves, one layer or the logits"
    return {
        "model": model,
        "method": experiment.method,
        "device": device,
        "device_gib": round(memory / GIB, 2),
        "parameters": counts.all,
        "base": sum(leaf.size for leaf in jax.tree.leaves(recipe.module.abstract_params())),
        "trainable": counts.trainable,
        "dtype": str(recipe.module.dtype),
        "rows": rows,
        "length": recipe.batch.length,
        "micro_batches": recipe.batch.micros,
        "remat": recipe.module.remat,
        "total_bytes": total,
        "source": source,
        "fits": fits(total, memory),
        "policies": {policy: _costs(c, rows, memory, card) for policy, c in policies.items()},
        "mesh": sizes,
        "placement": placed,
        "wire_bytes": cost.wire(recipe, recipe.abstract, sizes, rows)._asdict(),
        "remedies": [] if fits(total, memory) else list(remedies(experiment, policies, memory))[:3],
    }


def _costs(of: Cost, rows: int, memory: int, card: Card | None) -> dict[str, Any]:
    parts, batch = of.bytes(rows), of.recipe.batch
    seconds = of.seconds(rows, card) if card and card.flops else None
    return {
        "bytes": parts._asdict() | {"total": parts.total},
        "fits": fits(parts.total, memory),
        "largest_rows": of.largest(memory),
        "sweep_width": of.widest(rows, memory),
        "flops_a_token": of.flops / batch.length,
        "seconds_a_step": seconds,
        "tokens_a_second": seconds and rows * batch.length * batch.micros / seconds,
    }


def choose_micro_batch(experiment: Experiment, backend: str, card: Card, count: int = 1) -> tuple[dict[str, Any], str]:
    """Return the micro-batch and remat policy that are fastest on a card, {setting: value}, and why in words.

    Raises:
        UserError: no part of a batch fits.
    """
    recipe, batch = experiment.recipe, experiment.train.batch_size
    sizes, _ = devices.placement(experiment, count, lambda: card.memory, backend)
    parts = row_parts(sizes)
    if batch % parts:
        raise UserError(f"train.batch_size={batch} does not divide over {parts} devices; choose a multiple of them.")
    policies = cost.by_policy(recipe, backend)
    policies = {name: cost.on_mesh(found, recipe.abstract, sizes) for name, found in policies.items()}
    asked = recipe.module.remat
    open_ = policies if asked == "none" else {asked: policies[asked]}
    first = next(iter(open_))
    choice = cost.choose_micro_batch(open_, batch // parts, card.memory, card)
    gib = card.memory / GIB
    if choice is None:
        least = policies["full"].split(batch // parts).bytes(1).total / GIB
        ways = "\n  ".join(list(remedies(experiment, policies, card.memory))[:3])
        raise UserError(
            f"train.micro_batch=auto: not even one row of {recipe.batch.length} tokens at a time fits the device: with "
            f"model.remat=full it takes {least:.2f} of {gib:.2f} GiB (by formula, see `jaxtune plan`). The cheapest "
            f"remedies:\n  {ways}"
        )
    rows, micros = choice.rows * parts, batch // parts // choice.rows
    total = policies[choice.policy].split(micros).bytes(choice.rows).total / GIB
    note = f"train.micro_batch={rows} of {batch} rows and model.remat={choice.policy}: {total:.2f} of {gib:.2f} GiB"
    if (rows, choice.policy) == (batch, first):
        note += ", by formula; nothing has to be saved"
    else:
        most = open_[first].largest(card.memory)
        note += f", by formula, and the fastest that fits; {first} would hold {most} rows a device"
    return {"train.micro_batch": rows, "train.grad_accum": micros, "model.remat": choice.policy}, note


def resolve_micro_batch(experiment: Experiment, rows: Data) -> tuple[dict[str, Any], str]:
    """`choose_micro_batch` for this machine's devices and the rows that were read; nothing is loaded or compiled."""
    full = experiment.data.packing and not experiment.task.assembler.WITHIN  # else lines hold no more than rows do
    length = rows.length if full else min(rows.length, -(-rows.longest // 64) * 64)
    recipe = replace(experiment.recipe, batch=experiment.recipe.batch._replace(length=length))
    card = cost.card_of(jax.devices()[0].device_kind, free_bytes())
    return choose_micro_batch(replace(experiment, recipe=recipe), jax.default_backend(), card, jax.device_count())


def remedies(experiment: Experiment, policies: dict[str, Cost], memory: int) -> Iterator[str]:
    """Yield changes that make a run fit, the cheapest first."""
    recipe, batch = experiment.recipe, experiment.train.batch_size
    remat, rows, backend = recipe.module.remat, recipe.batch.rows, policies["full"].backend
    now = policies[remat]

    def most(other: Recipe) -> int:
        return cost.measure(other, backend).largest(memory)

    if part := _divisor(batch, now.largest(memory)):
        yield f"--config.train.grad_accum={batch // part} ({part} rows at a time, the same result)"
    order = list(policies)[list(policies).index(remat) + 1 :]
    for policy in order:
        if fits(policies[policy].bytes(rows).total, memory):
            slower = policies[policy].flops / now.flops - 1
            yield f"--config.model.remat={policy} (the same result, {slower:.0%} more operations)"
            break
    else:
        if order and (part := _divisor(batch, policies["full"].largest(memory))):
            flags = f"--config.model.remat=full --config.train.grad_accum={batch // part}"
            yield f"{flags} (the same result, {part} rows a part)"
    leanest = replace(recipe.with_module(remat="full"), batch=recipe.batch._replace(rows=1, micros=1))
    if recipe.module.dtype == jnp.float32 and (n := most(leanest.with_module(dtype=jnp.dtype(jnp.bfloat16)))):
        yield f"--config.model.dtype=bfloat16 --config.model.remat=full (up to {n} rows at a time)"
    for flag, leaner, helps in (
        ("tune.method=lora", replace(leanest, method=partial(tune, "lora", settings={})), not experiment.adapter),
        ("model.quantization=nf4", replace(leanest, quantization="nf4"), experiment.adapter),
    ):
        with suppress(UserError):  # a model that cannot be quantised, or has no matrix to adapt
            if helps and recipe.quantization == "none" and (n := most(leaner)):
                yield f"--config.{flag} --config.model.remat=full (up to {n} rows at a time)"
    short = max(16, recipe.batch.length // 2)
    if n := most(replace(leanest, batch=leanest.batch._replace(length=short))):
        yield f"--config.data.max_length={short} --config.model.remat=full (up to {n} rows at a time)"
    alone = cost.measure(leanest, backend)
    for n in (2, 4, 8, 16, 32, 64):
        if fits(cost.on_mesh(alone, recipe.abstract, {"data": 1, "fsdp": n}).bytes(1).total, memory):
            yield f"{n} devices: --config.mesh.fsdp={n} --config.model.remat=full (one row at a time on each)"
            break
    need = now.bytes(rows).total
    cards = sorted((c.memory, name) for name, c in cost.CARDS.items() if fits(need, c.memory))
    if cards:
        yield f"a larger card: {cards[0][1]} ({cards[0][0] / GIB:.0f} GiB)"
    else:
        yield f"no card of the list holds {need / GIB:.0f} GiB: a smaller model, or a method that trains less"


def _divisor(batch: int, most: int) -> int:
    """The largest divisor of a batch up to `most`; 0: none."""
    return next((n for n in range(min(batch, most), 0, -1) if batch % n == 0), 0)


@contextmanager
def explained_memory(experiment: Experiment) -> Iterator[None]:
    """Turn an out-of-memory error of the device into one that names remedies.

    Raises:
        RunFailed: in its place.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        ways = "\n  ".join(after_running_out(experiment))
        raise RunFailed(f"The device has not enough memory for this run. The cheapest remedies:\n  {ways}") from None


def after_running_out(experiment: Experiment) -> list[str]:
    """The three cheapest remedies for a run that has just run out of memory."""
    policies = cost.by_policy(experiment.recipe, jax.default_backend())
    taken = policies[experiment.module.remat].bytes(experiment.recipe.batch.rows).total
    too_little = int(cost.SLACK * taken + cost.WORKSPACE) - 1  # less memory was free than the formula needs
    return list(remedies(experiment, policies, min(free_bytes(), too_little)))[:3]
