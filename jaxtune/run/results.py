"""The end of a run: export the tuned weights, write summary and page, print the next commands."""

import importlib.metadata
import json
import math
import resource
import statistics
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxtune.data.tokenizer import tokenizer_with
from jaxtune.files import atomic_write_text, updating
from jaxtune.hf.card import loading
from jaxtune.hf.load import resolve
from jaxtune.reading import read_json
from jaxtune.report.card import carry_evaluation, run_facts
from jaxtune.run.training import as_it_ran, as_stored
from jaxtune.train import processes
from jaxtune.train.cost import chunks, dot_flops
from jaxtune.train.log import read_metrics
from jaxtune.train.loop import EARLY
from jaxtune.train.watch import findings
from jaxtune.tree import FROZEN
from jaxtune.weights.leaf import Adapter, is_weight


def has_adapter(params: Any) -> bool:
    """Whether the result is an adapter rather than a whole model."""
    return any(isinstance(w, Adapter) for w in jax.tree.leaves(params, is_leaf=is_weight))


def versions() -> dict[str, str]:
    """The versions of the packages that affect a result."""
    names = ("jaxtune", "jax", "flax", "optax", "orbax-checkpoint", "transformers")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            from jaxtune import __version__

            found[name] = __version__
    return found


def finish(member, place, job, params, run, clock, scored) -> None:
    """Write adapter/ or model/, summary.json and report.html; print the table and the next commands."""
    from jaxtune.hf.export import export_model
    from jaxtune.hf.peft import export_adapter
    from jaxtune.report import write_report
    from jaxtune.report.verdict import keep_verdict

    experiment, workdir = member.experiment, place.folder
    adapter = has_adapter(params)
    out = workdir / ("adapter" if adapter else "model")
    rows = read_metrics(workdir)
    summary = {
        "trainable": member.counts.trainable,
        "all": member.counts.all,
        "groups": member.counts.groups,
        "seconds": {k: round(v, 2) for k, v in clock.parts.items()},
        "device": jax.devices()[0].device_kind,
        "data": job.rows.report.lines(),
        "argv": place.argv,
        "auto_class": job.module.auto_class,
        "continues": experiment.task.continues,
        "best": run.best,
        "early_stop": run.ended == EARLY,
        "findings": [finding.as_json() for finding in findings(rows, experiment.rate_hint())],
        "samples": scored.samples() if scored else [],
        "scores": scored.scores() if scored else {},
        "data_report": job.rows.glance.as_json() | {"glance": True},
        "cost": _cost(job, max(row["step"] for row in rows)),
        **place.facts,
    }
    facts = run_facts(read_json(workdir / "config.json", halves=True), rows, summary)
    where = {
        "chat_template": _chat_template(experiment, job),
        "facts": facts,
        "ends": job.rows.ends,
        "overwrite": True,
        "vectors": experiment.task.result,
    }
    base = experiment.base
    new = base.new_tokens
    with tokenizer_with(base.tokenizer, new) if new else nullcontext(resolve(base.tokenizer)) as where["tokenizer"]:
        if adapter:
            where |= {"base": base.path, "base_folder": base.folder, "config": dict(experiment.settings)}
            where["record"] = workdir if base.init == "pretrained" else None
            notes = export_adapter(job.module, params, out, mask=member.mask, **where)
        else:
            params = as_stored(job, params, member.mask)
            notes = export_model(job.module, params, out, base=base.folder, tuned_from=base.path, **where)
    clock("export")
    summary["seconds"] = {k: round(v, 2) for k, v in clock.parts.items()}
    with updating(workdir):  # an evaluation writes its verdict there
        atomic_write_text(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    keep_verdict(workdir)
    carry_evaluation(workdir, out)
    page = write_report(workdir)
    if not job.stacked:
        _show(member, rows, clock, out, page, adapter, job.module)
    for note in notes:
        print(note)


def readable(params: Any, mask: Any) -> Any:
    """Parameters of which an adapter's own can be read by the first of several processes; all of them call it."""
    if not processes.several() or not has_adapter(params):
        return params
    return jax.tree.map(lambda x, role: x if role is FROZEN else processes.on_host(x), params, mask)


def follow(member, job, params) -> None:
    """What a process does while the first one writes the files of a result."""
    from jaxtune.hf.export import follow_export

    if not has_adapter(params):
        follow_export(job.module, as_stored(job, params, member.mask), base=member.experiment.base.folder)


def _chat_template(experiment, job) -> str | None:
    """The chat template to export, if it is not the tokenizer's own."""
    from jaxtune.data.chat import DEFAULT_TEMPLATE, without_date

    if experiment.base.chat_template:
        return without_date(job.rows.tokenizer.chat_template)
    chat = any(source.chat for source in job.rows.report.sources)
    return DEFAULT_TEMPLATE if chat and not job.rows.tokenizer.chat_template else None


def _cost(job, steps: int) -> dict[str, Any]:
    """FLOPs of a run's steps (in a sweep its share), and peak memory of the device, or of the process.

    FLOPs are those of matrix products of a compiled step, by the positions of its batch; how many
    positions batches have is estimated from a sample. With cached features, only the layers above them count.
    """
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    cost = {
        "peak_bytes": peak or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "peak_of": "device" if peak else "process",
        "runs": len(job.members),
    }
    if not steps:
        return cost
    job = as_it_ran(job)
    state, frozen, batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        (job.state, job.frozen, job.put(job.batch_at(0), list(range(len(job.members))))),
    )
    tokens, micros = batch["segments"].shape, job.experiment.recipe.batch.micros
    here = math.prod(tokens) // micros // (1 if batch["row"].ndim == 2 else len(job.members))
    trips = chunks(job.experiment.task, here, len(job.members))
    flops = dot_flops(job.step_fn.trace(state, frozen, batch).jaxpr.jaxpr, trips)
    sampled = [job.batch_at(step)["segments"].size for step in range(0, steps, max(1, steps // 32))]
    return cost | {"flops": flops / len(job.members) / math.prod(tokens) * statistics.fmean(sampled) * steps}


def _column(rows: list[dict], name: str) -> tuple[Any, Any]:
    """First and last value of a metric."""
    values = [m[name] for m in rows if name in m]
    return (values[0], values[-1]) if values else (None, None)


def _show(member, rows, clock, out: Path, page: Path, adapter: bool, module: Any) -> None:
    from jaxtune.hf.export import inputs
    from jaxtune.report import evaluation
    from jaxtune.report.run import read_run
    from jaxtune.report.sentences import measured

    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    metrics = measured(read_run(out.parent))
    if evaluation.who(metrics) == ["base", "tuned"]:
        table = Table("on held-out rows", "before", "after")
        for entry in metrics.values():
            values = (evaluation.value(entry, who) if who in entry else "" for who in ("base", "tuned"))
            table.add_row(entry["label"], *values)
        console.print(table)
    console.print(str(member.counts))
    first, last = _column(rows, "train/loss")
    losses = "" if first is None else f"train loss {first:.4f} -> {last:.4f}; "  # no loss was logged before it stopped
    console.print(f"{losses}{rows[-1]['step']} steps; {sum(clock.parts.values()):.1f} s in all "
                  f"({', '.join(f'{k} {v:.1f}' for k, v in clock.parts.items())})")  # fmt: skip
    console.print(f"\nresult: {out}\nreport: {page}\n")
    auto = module.auto_class
    labels = module.label_config
    base = member.experiment.base.path
    vectors = member.experiment.task.result is not None
    code = loading(base, str(out), adapter=adapter, auto=auto, config=labels, vectors=vectors, **inputs(module, out))
    for library, lines in code.items():
        console.print(f"load it with {library}:\n{textwrap.indent(lines, '  ')}\n", markup=False)
    if member.experiment.task.continues:
        console.print(f"try it:\n  jaxtune generate {out.parent} --prompt='...'", markup=False)
