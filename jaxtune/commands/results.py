"""The end of a run: the tuned weights in the formats others load, the facts, the page, and what to do next."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxtune.card import carry_evaluation, run_facts
from jaxtune.commands.job import as_stored, has_adapter, method_settings, rate_hint
from jaxtune.files import atomic_write_text
from jaxtune.hf.load import resolve
from jaxtune.log import read_metrics
from jaxtune.loop import EARLY
from jaxtune.models import auto_class
from jaxtune.watch import findings


def versions() -> dict[str, str]:
    """The versions that decide a result."""
    names = ("jaxtune", "jax", "flax", "optax", "orbax-checkpoint", "transformers")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            from jaxtune import __version__

            found[name] = __version__
    return found


def finish(member, place, j, params, run, clock, generated) -> None:
    """Write adapter/ or model/, summary.json and report.html; print the table and the next commands."""
    from jaxtune.hf.export import export_model
    from jaxtune.hf.peft import export_adapter
    from jaxtune.report import write_report

    cfg, workdir = member.cfg, place.folder
    adapter = has_adapter(params)
    out = workdir / ("adapter" if adapter else "model")
    rows = read_metrics(workdir)
    summary = {
        "trainable": member.counts.trainable,
        "all": member.counts.all,
        "groups": member.counts.groups,
        "seconds": {k: round(v, 2) for k, v in clock.parts.items()},
        "device": jax.devices()[0].device_kind,
        "data": j.data.report.lines(),
        "argv": place.argv,
        "best": run.best,
        "early_stop": run.ended == EARLY,
        "findings": [finding.as_json() for finding in findings(rows, rate_hint(cfg, j.model))],
        "samples": _samples(generated),
        **place.facts,
    }
    facts = run_facts(json.loads((workdir / "config.json").read_text()), rows, summary)
    where = {
        "tokenizer": resolve(cfg.model.tokenizer),
        "chat_template": _chat_template(cfg, j),
        "facts": facts,
        "overwrite": True,
    }
    if adapter:
        settings = dict(method_settings(cfg))
        notes = export_adapter(
            j.model.module, params, out, base=cfg.model.path, config=settings, mask=member.mask, **where
        )
    else:
        params = as_stored(cfg, j.model, params, member.mask)
        notes = export_model(j.model.module, params, out, base=j.model.folder, tuned_from=str(cfg.model.path), **where)
    carry_evaluation(workdir, out)
    clock("export")
    summary["seconds"] = {k: round(v, 2) for k, v in clock.parts.items()}
    atomic_write_text(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    page = write_report(workdir)
    if not j.stacked:
        _show(member, rows, clock, out, page, adapter, auto_class(j.model.module))
    for note in notes:
        print(note)


def _chat_template(cfg, j) -> str | None:
    """The template to write beside the weights, where it is not the tokenizer's own."""
    from jaxtune.data import DEFAULT_TEMPLATE

    if cfg.model.chat_template:
        return j.data.tokenizer.chat_template
    chat = any(source.format in ("chat", "sharegpt") for source in j.data.report.sources)
    return DEFAULT_TEMPLATE if chat and not j.data.tokenizer.chat_template else None


def _samples(generated) -> list[dict[str, str]]:
    if generated is None or not generated.answers:
        return []
    before = generated.answers[0] if len(generated.answers) > 1 else [""] * len(generated.examples)
    after = generated.answers[-1]
    return [
        {"prompt": e.text, "expected": e.expected, "before": b, "after": a}
        for e, b, a in list(zip(generated.examples, before, after, strict=True))[:20]
    ]


def _column(rows: list[dict], name: str) -> tuple[Any, Any]:
    """First and last value of a metric."""
    values = [m[name] for m in rows if name in m]
    return (values[0], values[-1]) if values else (None, None)


def _show(member, rows, clock, out: Path, page: Path, adapter: bool, auto: str) -> None:
    console = Console(soft_wrap=True, highlight=False)
    table = Table("", "before", "after")
    shown = {"eval/loss": "held-out loss", "eval/json_valid": "valid JSON", "eval/json_exact": "all fields right"}
    shown |= {"eval/accuracy": "accuracy", "eval/macro_f1": "macro F1", "eval/entity_f1": "entity F1"}
    for name, label in shown.items():
        before, after = _column(rows, name)
        if before is not None:
            text = "{:.4f}" if name == "eval/loss" else "{:.1%}"
            table.add_row(label, text.format(before), text.format(after))
    if table.row_count:
        console.print(table)
    first, last = _column(rows, "train/loss")
    console.print(str(member.counts))
    losses = "" if first is None else f"train loss {first:.4f} -> {last:.4f}; "  # none was logged before it stopped
    console.print(f"{losses}{rows[-1]['step']} steps; {sum(clock.parts.values()):.1f} s in all "
                  f"({', '.join(f'{k} {v:.1f}' for k, v in clock.parts.items())})")  # fmt: skip
    console.print(f"\nresult: {out}\nreport: {page}\n")
    base, quoted = str(member.cfg.model.path), str(out)
    if adapter:
        console.print(
            "load it with peft:\n"
            f"  from transformers import {auto}; from peft import PeftModel\n"
            f"  model = PeftModel.from_pretrained({auto}.from_pretrained({base!r}), {quoted!r})\n"
            "with jaxtune:\n"
            f"  import jaxtune; module, params = jaxtune.load({base!r})\n"
            f"  params, mask, config = jaxtune.load_adapter(module, params, {quoted!r}, base={base!r})",
            markup=False,
        )
    else:
        console.print(
            "load it with transformers:\n"
            f"  from transformers import {auto}\n"
            f"  model = {auto}.from_pretrained({quoted!r})\n"
            "with jaxtune:\n"
            f"  import jaxtune; module, params = jaxtune.load({quoted!r})",
            markup=False,
        )
    if auto == "AutoModelForCausalLM":
        console.print(f"or try it:\n  jaxtune generate {out.parent} --prompt='...'", markup=False)
