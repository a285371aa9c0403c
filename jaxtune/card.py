"""The model card, README.md of an exported directory: front matter for the hub, facts of the run, how to load it."""

import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxtune.files import atomic_write_text

AUTO = {  # objective.name -> the class of transformers that loads the result
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
}


def loading(base: str, here: str, *, adapter: bool, auto: str = AUTO["causal_lm"]) -> dict[str, str]:
    """Code to paste that loads a result: library -> lines.

    Args:
        base: hub id or path of the model that was tuned.
        here: the directory of the adapter or the model.
        auto: the class of transformers that loads it.
    """
    base, here = json.dumps(base), json.dumps(here)
    if adapter:
        return {
            "peft": "from peft import PeftModel\n"
            f"from transformers import {auto}, AutoTokenizer\n\n"
            f"base = {auto}.from_pretrained({base})\n"
            f"model = PeftModel.from_pretrained(base, {here})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({here})",
            "jaxtune": f"import jaxtune\n\nmodule, params = jaxtune.load({base})\n"
            f"params, mask, config = jaxtune.load_adapter(module, params, {here}, base={base})",
        }
    return {
        "transformers": f"from transformers import {auto}, AutoTokenizer\n\n"
        f"model = {auto}.from_pretrained({here})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({here})",
        "jaxtune": f"import jaxtune\n\nmodule, params = jaxtune.load({here})",
    }


_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModel": "feature-extraction",
}


def model_card(
    *,
    name: str,
    base: str,
    adapter: str | None,
    facts: Mapping[str, Any] | None = None,
    notes: Iterable[str] = (),
    auto: str = "AutoModelForCausalLM",
) -> str:
    """Return the text of README.md.

    Args:
        name: of the directory.
        base: hub id or path of the model that was tuned.
        adapter: for a PEFT directory rather than a whole model, its kind, "lora".
        facts: what to tell about the run, label -> value, in order; see `run_facts`.
        notes: sentences on what a reader would not expect.
        auto: the class of transformers that loads the model.
    """
    library = "peft" if adapter else "transformers"
    tags = ["jaxtune", *([adapter, f"base_model:adapter:{base}"] if adapter else [])]
    front = [
        f"base_model: {json.dumps(base)}",
        f"library_name: {library}",
        f"pipeline_tag: {_PIPELINES[auto]}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    what = "A LoRA adapter for" if adapter else "A fine-tuned version of"
    blocks = ["\n".join(["---", *front, "---"]), f"# {name}", f"{what} `{base}`, made with jaxtune."]
    blocks += notes
    if facts:
        rows = [f"| {label} | {_cell(value)} |" for label, value in facts.items()]
        blocks.append("\n".join(["## The run", "", "| | |", "|---|---|", *rows]))
    code = loading(base, name, adapter=bool(adapter), auto=auto)
    blocks.append("\n\n".join(["## How to load it", *(f"```python\n{lines}\n```" for lines in code.values())]))
    return "\n\n".join(blocks) + "\n"


_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def carry_evaluation(run: Path, out: Path) -> None:
    """Put what `jaxtune eval` measured of a run's last step into the card of its result, which lies in `out`."""
    from jaxtune.log import read_metrics
    from jaxtune.report.evaluation import read_evaluation

    steps = [m["step"] for m in read_metrics(run)] if (run / "metrics.jsonl").is_file() else []
    evaluation = read_evaluation(run, max(steps, default=None))
    if evaluation and (out / "README.md").is_file():
        put_evaluation(out / "README.md", evaluation)


def put_evaluation(card: Path, evaluation: Mapping[str, Any]) -> None:
    """Put the results of eval.json into a card that `model_card` wrote, before how to load it; older ones go."""
    text = card.read_text(encoding="utf-8")
    head, found, rest = text.partition(_BEGIN)
    if found:
        text = head + rest.partition(_END)[2].lstrip("\n")
    head, heading, rest = text.partition("## How to load it")
    block = evaluation_block(evaluation)
    if heading and block:
        atomic_write_text(card, f"{head}{_BEGIN}\n{block}\n{_END}\n\n{heading}{rest}")


def evaluation_block(evaluation: Mapping[str, Any]) -> str:
    """The results of eval.json in Markdown; empty where there are none."""
    from jaxtune.report.evaluation import difference, value, verdict, who

    blocks = []
    held_out = evaluation.get("held_out")
    if held_out:
        entries = held_out["metrics"]
        names = who(entries)
        both = len(names) == 2
        heads = [f"{held_out['rows']:,} held-out rows", *names, *(["difference", "verdict"] if both else [])]
        rows = [
            [entry["label"], *(value(entry, n) for n in names), *([difference(entry), verdict(entry)] if both else [])]
            for entry in entries.values()
        ]
        blocks.append("\n".join(_table([heads, *rows])))
        blocks.append("Intervals hold 95% (bootstrap over rows); verdicts are those of a paired randomisation test.")
    tasks = evaluation.get("tasks")
    if tasks:
        results = tasks["results"]
        rows = [["task of lm-evaluation-harness", "metric", *results]]
        for task, metrics in next(iter(results.values())).items():
            for metric in metrics:
                rows.append([task, metric, *(f"{results[who][task][metric]['value']:.4f}" for who in results)])
        blocks.append("\n".join(_table(rows)))
    return "\n\n".join(["## Evaluation", *blocks]) if blocks else ""


def _table(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


def _cell(value: Any) -> str:
    return _text(value).replace("|", "\\|").replace("\n", " ")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return str(value)


def run_facts(
    config: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]] = (), summary: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Choose what a card tells about a run: label -> value.

    Args:
        config: the resolved config, a mapping of sections.
        metrics: the records of metrics.jsonl, in order.
        summary: with "trainable" and "all", numbers of parameters.
    """
    tune, data, optim, train = (config[section] for section in ("tune", "data", "optim", "train"))
    facts: dict[str, Any] = {"method": tune["method"]}
    if tune["method"] == "lora":
        facts |= {label: tune["lora"][label] for label in ("r", "lora_alpha", "lora_dropout", "target_modules")}
    facts |= {
        "data": data["train"],
        "held-out data": data["eval"] or (f"{data['eval_fraction']:g} of it" if data["eval_fraction"] else "none"),
        "optimizer": f"{optim['name']}, learning rate {optim['lr']:g}, {optim['schedule']} schedule",
        "batch size": train["batch_size"],
        "seed": train["seed"],
    }
    if summary and "trainable" in summary:
        facts["trainable parameters"] = f"{summary['trainable']:,} of {summary['all']:,}"
    return facts | _results(list(metrics)) | {"versions": _versions(config.get("versions"))}


def _results(metrics: list[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if metrics:
        found["steps"] = metrics[-1].get("step")
    losses = [r for r in metrics if "train/loss" in r]
    if losses:
        first, last = losses[0], losses[-1]
        found["training loss"] = (
            f"{first['train/loss']:.4f} (step {first['step']}) to {last['train/loss']:.4f} (step {last['step']})"
        )
    held_out = [r for r in metrics if r.get("eval/loss") is not None and r["step"]]  # step 0 is the base
    if held_out:
        best = min(held_out, key=lambda r: r["eval/loss"])
        found["best held-out loss"] = f"{best['eval/loss']:.4f} (step {best['step']})"
    for key in dict.fromkeys(k for r in metrics for k in r if k.startswith("eval/") and k != "eval/loss"):
        value = next(r[key] for r in reversed(metrics) if key in r)
        if isinstance(value, int | float):
            found[key] = float(value)
    return found


def _versions(recorded: Mapping[str, str] | None) -> list[str]:
    if not recorded:
        recorded = {name: metadata.version(name) for name in ("jax", "flax", "optax", "transformers")}
    # A run also records the fingerprint of its data there, and where its features end.
    return [f"{name} {version}" for name, version in recorded.items() if name not in ("data", "features")]
