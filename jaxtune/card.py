"""The model card, README.md of an exported directory: front matter for the hub, facts of the run, how to load it."""

import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

_LOAD_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), {here})
```

```python
import jaxtune

module, params = jaxtune.load({base})
params, mask, config = jaxtune.load_adapter(module, params, {here}, base={base})
```
"""

_LOAD_MODEL = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({here})
```

```python
import jaxtune

module, params = jaxtune.load({here})
```
"""


def model_card(
    *, name: str, base: str, adapter: bool, facts: Mapping[str, Any] | None = None, notes: Iterable[str] = ()
) -> str:
    """Return the text of README.md.

    Args:
        name: of the directory.
        base: hub id or path of the model that was tuned.
        adapter: a PEFT directory rather than a whole model.
        facts: what to tell about the run, label -> value, in order; see `run_facts`.
        notes: sentences on what a reader would not expect.
    """
    library = "peft" if adapter else "transformers"
    tags = ["jaxtune", *(["lora", f"base_model:adapter:{base}"] if adapter else [])]
    front = [
        f"base_model: {json.dumps(base)}",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    what = "A LoRA adapter for" if adapter else "A fine-tuned version of"
    blocks = ["\n".join(["---", *front, "---"]), f"# {name}", f"{what} `{base}`, made with jaxtune."]
    blocks += notes
    if facts:
        rows = [f"| {label} | {_cell(value)} |" for label, value in facts.items()]
        blocks.append("\n".join(["## The run", "", "| | |", "|---|---|", *rows]))
    code = (_LOAD_ADAPTER if adapter else _LOAD_MODEL).format(base=json.dumps(base), here=json.dumps(name))
    blocks.append(f"## How to load it\n\n{code}")
    return "\n\n".join(blocks)


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
    held_out = [r for r in metrics if r.get("eval/loss") is not None]
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
    # A run also records the fingerprint of its data there.
    return [f"{name} {version}" for name, version in recorded.items() if name != "data"]
