"""The end of a run: the tuned weights in the formats others load, the facts, the page, and what to do next."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxtune.card import run_facts
from jaxtune.commands.job import as_stored, has_adapter, method_settings
from jaxtune.files import atomic_write_text
from jaxtune.hf.load import resolve
from jaxtune.log import read_metrics


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


def finish(cfg, argv: list[str], workdir: Path, j, params, result, clock, generated) -> None:
    """Write adapter/ or model/, summary.json and report.html; print the table and the next commands."""
    from jaxtune.hf.export import export_model
    from jaxtune.hf.peft import export_adapter
    from jaxtune.report import write_report

    adapter = has_adapter(params)
    out = workdir / ("adapter" if adapter else "model")
    rows = read_metrics(workdir)
    summary = {
        "trainable": j.counts.trainable,
        "all": j.counts.all,
        "groups": j.counts.groups,
        "seconds": {k: round(v, 2) for k, v in clock.parts.items()},
        "device": jax.devices()[0].device_kind,
        "data": j.data.report.lines(),
        "argv": ["jaxtune", "train", *argv],
        "best": result.best,
        "early_stop": result.early,
        "samples": _samples(generated),
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
        notes = export_adapter(j.model.module, params, out, base=cfg.model.path, config=settings, mask=j.mask, **where)
    else:
        params = as_stored(cfg, j.model, params, j.mask)
        notes = export_model(j.model.module, params, out, base=j.model.folder, tuned_from=str(cfg.model.path), **where)
    clock("export")
    summary["seconds"] = {k: round(v, 2) for k, v in clock.parts.items()}
    atomic_write_text(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    page = write_report(workdir)
    _show(cfg, j, rows, clock, out, page, adapter, int(result.state.step))
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


def _show(cfg, j, rows, clock, out: Path, page: Path, adapter: bool, steps: int) -> None:
    console = Console(soft_wrap=True, highlight=False)
    table = Table("", "before", "after")
    shown = {"eval/loss": "held-out loss", "eval/json_valid": "valid JSON", "eval/json_exact": "all fields right"}
    for name, label in shown.items():
        before, after = _column(rows, name)
        if before is not None:
            text = "{:.4f}" if name == "eval/loss" else "{:.1%}"
            table.add_row(label, text.format(before), text.format(after))
    if table.row_count:
        console.print(table)
    first, last = _column(rows, "train/loss")
    console.print(str(j.counts))
    losses = "" if first is None else f"train loss {first:.4f} -> {last:.4f}; "  # none was logged before it stopped
    console.print(f"{losses}{steps} steps; {sum(clock.parts.values()):.1f} s in all "
                  f"({', '.join(f'{k} {v:.1f}' for k, v in clock.parts.items())})")  # fmt: skip
    console.print(f"\nresult: {out}\nreport: {page}\n")
    base, quoted = str(cfg.model.path), str(out)
    if adapter:
        console.print(
            "load it with peft:\n"
            "  from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
            f"  model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {quoted!r})\n"
            "with jaxtune:\n"
            f"  import jaxtune; module, params = jaxtune.load({base!r})\n"
            f"  params, mask, config = jaxtune.load_adapter(module, params, {quoted!r}, base={base!r})",
            markup=False,
        )
    else:
        console.print(
            "load it with transformers:\n"
            "  from transformers import AutoModelForCausalLM\n"
            f"  model = AutoModelForCausalLM.from_pretrained({quoted!r})\n"
            "with jaxtune:\n"
            f"  import jaxtune; module, params = jaxtune.load({quoted!r})",
            markup=False,
        )
    console.print(f"or try it:\n  jaxtune generate {out.parent} --prompt='...'", markup=False)
