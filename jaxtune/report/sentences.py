"""A run in three sentences: what was tuned, how the loss moved, what it cost; and its findings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.evaluate.known import KNOWN
from jaxtune.report import evaluation
from jaxtune.report.run import RunRecord, is_number
from jaxtune.report.words import amount, duration, memory, number, percent, setting
from jaxtune.train import watch

WHAT = {  # method -> the part of the model that it trains; %(path)s is the value of a setting
    "full": "All weights of",
    "head": "The head of",
    "bitfit": "The biases of",
    "norms": "The norms of",
    "embeddings": "The embeddings of",
    "last_n": "The last %(tune.last_n.layers)s layers of",
    "regex": "The parameters that match %(tune.regex.pattern)s of",
    "hira": "HiRA adapters (rank %(tune.hira.r)s) for",
    "miss": "MiSS adapters (rank %(tune.miss.r)s) for",
    "ia3": "(IA)³ vectors for",
    "prompt_tuning": "%(tune.prompt_tuning.num_virtual_tokens)s virtual tokens for",
}
SHARES = {"eval/json_exact": "answers with every JSON field right", "eval/accuracy": "accuracy", "eval/entity_f1": "F1"}


def summary(run: RunRecord) -> list[str]:
    """The three sentences."""
    return [_what(run), _result(run), _cost(run)]


def _what(run: RunRecord) -> str:
    settings = run.settings
    method = settings["tune.method"]
    what = WHAT[method] % settings if method in WHAT else _lora(settings)
    start = " from random weights" if settings["model.init"] == "random" else ""
    over = settings.get("model.quantization", "none")
    base = f"{run.model} in {over.upper()}" if over != "none" else run.model
    data = " and ".join(Path(name).name for name in settings["data.train"] or ()) or "the data"
    trainable, total = run.fact("trainable"), run.fact("all")
    share = f": {trainable:,} of {total:,} parameters, {percent(trainable / total)}" if trainable and total else ""
    return f"{what} {base} were tuned{start} on {data} for {_steps(run)}{share}."


def _lora(settings: dict[str, Any]) -> str:
    targets = settings["tune.lora.target_modules"]
    on = "all linear layers" if targets in ("all-linear", ("all-linear",)) else setting(targets) if targets else ""
    if settings.get("tune.lora.target_parameters"):
        on = f"{on} and experts" if on else "experts"
    kind = "DoRA" if settings["tune.lora.use_dora"] else "LoRA"
    rank, alpha = settings["tune.lora.r"], number(settings["tune.lora.lora_alpha"])
    return f"{kind} adapters (rank {rank}, alpha {alpha}, on {on}) for"


def _steps(run: RunRecord) -> str:
    last, planned = run.last_step(), run.settings["train.steps"]
    if planned and last < planned:
        return f"{last:,} of {planned:,} steps so far" if not run.summary else f"{last:,} of {planned:,} steps"
    return f"{last:,} steps"


def _result(run: RunRecord) -> str:
    text = _loss(run)
    held_out = run.evaluation.get("held_out")
    tally = evaluation.tally(held_out["metrics"].values()) if held_out else ""
    if tally:
        return f"{text}; measured on {held_out['rows']:,} held-out rows, {tally}."
    before, after = run.before(), run.after()
    for key, what in SHARES.items():
        if key in before and key in after:
            return f"{text}, and {what} went from {percent(before[key])} to {percent(after[key])}."
    return f"{text}."


def _loss(run: RunRecord) -> str:
    evals, best, losses = run.series("eval/loss"), run.best(), run.series("train/loss")
    if len(evals) > 1:
        first = evals[0]
        origin = "before tuning" if first.step == 0 else f"at step {first.step:,}"
        if best.value >= first.value:
            text = f"Held-out loss never fell below the {number(first.value)} {origin}"
        else:
            text = (
                f"Held-out loss fell from {number(first.value)} {origin} to {number(best.value)} at step {best.step:,}"
            )
        if evals[-1].value > min(best.value, first.value):
            text += f" and ended at {number(evals[-1].value)}"
        return text
    if len(losses) > 1:
        first, last = losses[0], losses[-1]
        verb = "fell" if last.value < first.value else "went"
        text = f"Training loss {verb} from {number(first.value)} (step {first.step:,}) to {number(last.value)}"
        return text + f" (step {last.step:,})" + ("" if evals else "; there was no held-out data")
    return f"Held-out loss is {number(evals[0].value)} at step {evals[0].step:,}" if evals else "No loss is logged yet"


def _cost(run: RunRecord) -> str:
    seconds, tokens, speed, device = run.seconds(), run.tokens(), run.speed(), run.summary.get("device")
    parts = []
    if tokens is not None:
        parts.append(f"read {tokens:,} tokens")
    if speed is not None:
        parts.append(f"at {number(speed)} tokens a second" if parts else f"ran at {number(speed)} tokens a second")
    if isinstance(device, str):
        parts.append(f"on {device}" if parts else f"ran on {device}")
    if seconds is not None:
        return " ".join([f"It took {duration(seconds)}" + (" and" if parts else ""), *parts]) + "."
    return f"It {' '.join(parts)}." if parts else "Its cost is not recorded."


# --------------------------------------------------------------------------------------------------- what it came to


SIZES = ("tokens", "rows", "seconds")  # of an evaluation, not results
CURVES = ("canaries", "known", "memory")  # shown over the steps alone


def measured(run: RunRecord) -> dict[str, dict[str, Any]]:
    """The metrics of base and tuned model, as in eval.json; without eval.json, those of training.

    Training's are mostly values without an interval; the run's summary has intervals for scores of generated answers.
    """
    if "held_out" in run.evaluation:
        return run.evaluation["held_out"]["metrics"]
    before, after = run.before(), run.after()
    names = [key.removeprefix("eval/") for key in (*before, *after)]
    scores = run.scores()
    return {
        name: scores.get(name) or _plain(name, before.get(f"eval/{name}"), after.get(f"eval/{name}"))
        for name in dict.fromkeys([*KNOWN, *names])
        if name in names and name not in SIZES and name.partition("/")[0] not in CURVES
    }


def _plain(name: str, before: float | None, after: float | None) -> dict[str, Any]:
    label, better, share = KNOWN.get(name, (name.replace("_", " "), 0, False))
    pairs = {"base": before, "tuned": after}
    if before is not None and after is not None:
        pairs["difference"] = after - before
    values = {who: {"value": value, "low": None, "high": None} for who, value in pairs.items() if value is not None}
    return {"label": label, "better": better, "share": share, "rows": 0} | values


# --------------------------------------------------------------------------------------------------------- its cost


class Fact(NamedTuple):
    """A value with its name and a note."""

    label: str
    figure: str
    note: str = ""


def costs(run: RunRecord) -> list[Fact]:
    """The recorded costs of the run."""
    return list(_costs(run))


def _costs(run: RunRecord) -> Iterator[Fact]:
    trainable, total = run.fact("trainable"), run.fact("all")
    if trainable and total:
        yield Fact("Trained", percent(trainable / total), f"{trainable:,} of {total:,} parameters")
    seconds, tokens, flops = run.seconds(), run.tokens(), run.cost("flops")
    if seconds is not None:
        yield Fact("Time", duration(seconds), str(run.summary.get("device") or ""))
    if tokens:
        speed = run.speed()
        yield Fact("Tokens", f"{tokens:,}", f"{number(speed)} a second" if speed is not None else "")
    if flops:
        training = run.seconds_by_part().get("train")
        notes = [f"{amount(flops / tokens, 'FLOP')} a token"] if tokens else []
        notes += [f"{amount(flops / training, 'FLOP/s')} while training"] if training else []
        yield Fact("Operations", amount(flops, "FLOP"), ", ".join(notes))
    peak, runs = run.cost("peak_bytes"), run.cost("runs") or 1
    if peak:
        note = f"of the {run.summary['cost'].get('peak_of', 'process')}" + (f", with {runs:g} runs" if runs > 1 else "")
        yield Fact("Peak memory", memory(peak), note)


# ------------------------------------------------------------------------------------------------- what to know of it


def findings(run: RunRecord) -> list[dict[str, Any]]:
    """The run's findings: {"check", "severity", "step", "message", "fix"}, in the order of their steps.

    For an unfinished run, or an old one that did not store them, they are derived from its metrics.
    """
    if "findings" not in run.summary:
        lines = ({name: value for name, value in line.items() if is_number(value)} for line in run.metrics)
        lines = (line for line in lines if "train/loss" in line or not any(name.startswith("train/") for name in line))
        return [finding.as_json() for finding in watch.findings(lines)]
    return [
        {
            "severity": entry["severity"] if entry.get("severity") in ("error", "warning") else "note",
            "step": entry["step"] if isinstance(entry.get("step"), int) else 0,
            **{name: str(entry.get(name) or "") for name in ("check", "message", "fix")},
        }
        for entry in run.facts("findings", dict)
    ]
