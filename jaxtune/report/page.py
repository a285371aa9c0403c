"""The page of one run: what came of it, the curves, samples, how to use the result, and the facts."""

import difflib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config import ADAPTERS, BY_PATH
from jaxtune.report import evaluation
from jaxtune.report.chart import Series, chart, smooth
from jaxtune.report.html import Html, duration, h, join, number, percent, text
from jaxtune.report.run import Run
from jaxtune.report.theme import CSS, JS

MOST_SAMPLES = 20
SHOWN_SAMPLES = 5  # the others unfold
LONGEST_SAMPLE = 4000  # characters of a text
ALIKE = 0.5  # share of words in common from which marking the others helps
NO_TASKS = {"results": {}}
ARROW = Html(' <s aria-label="to">→</s> ')


def run_page(run: Run) -> str:
    """Return the HTML of a run's page."""
    held_out = run.evaluation.get("held_out", {})
    return document(
        run.name,
        h("p", f"jaxtune · {run.settings['tune.method']} · {run.model}", class_="eyebrow"),
        h("h1", run.name),
        h("p", " ".join(summary(run)), class_="lead"),
        _tiles(run),
        section("Before and after", _before_after(run)),
        section("Groups", evaluation.group_tables(held_out)),
        section("Labels", evaluation.confusion_tables(held_out)),
        section("Tasks of lm-evaluation-harness", evaluation.task_table(run.evaluation.get("tasks", NO_TASKS))),
        section("Curves", _curves(run), _overfitting(run), _evaluations(run)),
        section("Samples", _samples(run)),
        section("Use the result", _use(run)),
        section("Settings that differ from the defaults", settings_table(run.overrides)),
        h(
            "div",
            section("Trained parameters", _parameters(run)),
            section("Data", _data(run)),
            section("Where the time went", _times(run)),
            section("Versions", _versions(run)),
            class_="columns",
        ),
        section("Do it again", *reproduce(run)),
    )


def document(title: str, *body: Html | None) -> str:
    """Return a whole page, which neither needs nor is allowed any network."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=policy),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("link", rel="icon", href="data:,"),
        h("title", f"{title} · jaxtune"),
        h("style", Html(CSS)),
    )
    footer = h(
        "footer", "Written by jaxtune from config.json, metrics.jsonl, summary.json and eval.json; it needs no network."
    )
    main = h("main", *body, footer)
    return Html("<!doctype html>\n") + h("html", head, h("body", main, h("script", Html(JS))), lang="en") + "\n"


def section(title: str, *content: Html | None) -> Html | None:
    """A heading and what is under it; None where that is nothing."""
    content = [part for part in content if part]
    return h("section", h("h2", title), *content) if content else None


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    right: int | None = None,
    sortable: bool = False,
    filterable: bool = False,
) -> Html:
    """A table in a box that scrolls.

    Args:
      heads: column titles.
      rows: a cell is text, markup, or `(value, shown)` where the table sorts by `value`.
      right: from this column on, cells are numbers, aligned to the right.
      sortable: a click on a heading sorts.
      filterable: words typed above it choose rows.
    """

    def cell(tag, i, value):
        sort_by, shown = value if isinstance(value, tuple) else (None, value)
        return h(tag, shown, class_="num" if right is not None and i >= right else None, data_v=sort_by)

    body = [h("tr", *(cell("td" if i else "th", i, value) for i, value in enumerate(row))) for row in rows]
    head = h("thead", h("tr", *(cell("th", i, title) for i, title in enumerate(heads))))
    kinds = " ".join(["sortable"] * sortable + ["filterable"] * filterable)
    return h("div", h("table", head, h("tbody", *body), class_=kinds or None), class_="box")


def snippet(code: str) -> Html:
    """Code to paste."""
    return h("div", h("pre", code), class_="snippet")


# ------------------------------------------------------------------------------------------------------ the summary


def summary(run: Run) -> list[str]:
    """Three sentences: what was tuned, how the loss moved, what it cost."""
    return [_what(run), _loss(run), _cost(run)]


def _what(run: Run) -> str:
    settings = run.settings
    what = {"full": "All weights of", "head": "The final norm and LM head of"}.get(settings["tune.method"])
    if what is None:
        alpha, targets = settings["tune.lora.lora_alpha"], settings["tune.lora.target_modules"]
        on = "on all linear layers" if targets in ("all-linear", ("all-linear",)) else f"on {shown(targets)}"
        what = f"LoRA adapters (rank {settings['tune.lora.r']}, alpha {number(alpha)}, {on}) for"
    start = " from random weights" if settings["model.init"] == "random" else ""
    data = " and ".join(Path(name).name for name in settings["data.train"] or ()) or "the data"
    trainable, total = run.fact("trainable"), run.fact("all")
    share = f": {trainable:,} of {total:,} parameters, {percent(trainable / total)}" if trainable and total else ""
    return f"{what} {run.model} were tuned{start} on {data} for {_steps(run)}{share}."


def _steps(run: Run) -> str:
    last, planned = run.last_step(), run.settings["train.steps"]
    if planned and last < planned:
        return f"{last:,} of {planned:,} steps so far" if not run.summary else f"{last:,} of {planned:,} steps"
    return f"{last:,} steps"


def _loss(run: Run) -> str:
    evals, best, losses = run.series("eval/loss"), run.best(), run.series("train/loss")
    if len(evals) > 1:
        first = evals[0]
        origin = "before tuning" if first.step == 0 else f"at step {first.step:,}"
        if best.step == first.step:
            told = f"Held-out loss never fell below the {number(first.value)} {origin}"
        else:
            told = (
                f"Held-out loss fell from {number(first.value)} {origin} to {number(best.value)} at step {best.step:,}"
            )
        if best.step != evals[-1].step and evals[-1].value > best.value:
            told += f" and ended at {number(evals[-1].value)}"
    elif len(losses) > 1:
        first, last = losses[0], losses[-1]
        verb = "fell" if last.value < first.value else "went"
        told = f"Training loss {verb} from {number(first.value)} (step {first.step:,}) to {number(last.value)}"
        told += f" (step {last.step:,})" + ("" if evals else "; there was no held-out data")
    elif evals:
        told = f"Held-out loss is {number(best.value)} at step {best.step:,}"
    else:
        told = "No loss is logged yet"
    held_out = run.evaluation.get("held_out")
    tally = evaluation.tally(held_out["metrics"].values()) if held_out else ""
    if tally:
        return f"{told}; measured on {held_out['rows']:,} held-out rows, {tally}."
    exact = next((m for m in compared(run) if m.key == "eval/json_exact" and m.before is not None), None)
    if exact and exact.after is not None:
        told += f", and answers with every JSON field right went from {percent(exact.before)} to {percent(exact.after)}"
    return f"{told}."


def _cost(run: Run) -> str:
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


def _tiles(run: Run) -> Html:
    def tile(label, value, note=""):
        return h("div", h("span", label), h("b", value), h("small", note) if note else None, class_="tile")

    tiles = []
    best = run.best()
    for metric in compared(run):
        if metric.key in ("eval/loss", "eval/json_valid", "eval/json_exact") and metric.after is not None:
            value = metric.show(metric.after)
            if metric.before is not None:
                value = join([h("s", metric.show(metric.before)), ARROW, value])
            note = f"the best, at step {best.step:,}" if metric.key == "eval/loss" and best else "of held-out rows"
            tiles.append(tile(metric.label, value, note))
    trainable, total = run.fact("trainable"), run.fact("all")
    if trainable and total:
        tiles.append(tile("Trained", percent(trainable / total), f"{trainable:,} of {total:,} parameters"))
    if run.seconds() is not None:
        tiles.append(tile("Time", duration(run.seconds()), str(run.summary.get("device") or "")))
    if run.speed() is not None:
        tokens = run.tokens()
        tiles.append(tile("Tokens a second", number(run.speed()), f"{tokens:,} read" if tokens else ""))
    most = 4 if len(tiles) % 4 == 0 else 3
    return h("div", *tiles, class_="tiles", style=f"--most:{most}")


# --------------------------------------------------------------------------------------------------- before and after


class Compared(NamedTuple):
    """A metric before and after tuning.

    better: -1 where less is better, 1 where more is, 0 where we do not know.
    """

    key: str
    label: str
    before: float | None
    after: float | None
    better: int
    share: bool

    def show(self, value: float) -> str:
        return percent(value) if self.share else number(value)

    def change(self) -> Html | str:
        if self.before is None or self.after is None:
            return ""
        delta = self.after - self.before
        size = f"{100 * abs(delta):.1f} points" if self.share else number(abs(delta))
        if delta == 0:
            return "none"
        told = f"{'+' if delta > 0 else '−'}{size}"
        if not self.better:
            return told
        good = delta * self.better > 0
        return h("div", told, h("small", " better" if good else " worse"), class_="good" if good else "bad")


KNOWN = {  # key -> label, what is better, whether it is a share
    "eval/loss": ("Held-out loss", -1, False),
    "eval/perplexity": ("Perplexity", -1, False),
    "eval/accuracy": ("Accuracy", 1, True),
    "eval/macro_f1": ("Macro F1", 1, True),
    "eval/entity_f1": ("Entity F1", 1, True),
    "eval/entity_precision": ("Entity precision", 1, True),
    "eval/entity_recall": ("Entity recall", 1, True),
    "eval/json_valid": ("Valid JSON", 1, True),
    "eval/json_exact": ("Every field right", 1, True),
}
SIZES = ("eval/tokens", "eval/rows", "eval/seconds")  # of an evaluation, not results


def compared(run: Run) -> list[Compared]:
    """The evaluation metrics, those we know first."""
    before, after = run.before(), run.after()
    keys = [key for key in dict.fromkeys([*KNOWN, *before, *after]) if key in (before | after) and key not in SIZES]
    rows = []
    for key in keys:
        label, better, share = KNOWN.get(key, (key.removeprefix("eval/").replace("_", " "), 0, False))
        rows.append(Compared(key, label, before.get(key), after.get(key), better, share))
    return rows


def _before_after(run: Run) -> Html | None:
    if run.evaluation.get("held_out"):
        return evaluation.held_out_table(run.evaluation["held_out"])
    metrics = compared(run)
    if not any(m.before is not None and m.after is not None for m in metrics):
        return None
    rows = [
        (
            m.label,
            "" if m.before is None else m.show(m.before),
            "" if m.after is None else m.show(m.after),
            m.change(),
        )
        for m in metrics
    ]
    return table(("on held-out rows", "before", "after", "change"), rows, right=1)


# ------------------------------------------------------------------------------------------------------------- curves


def _curves(run: Run) -> Html | None:
    loss, evals, best = run.series("train/loss"), run.series("eval/loss"), run.best()
    note = f"best {number(best.value)} at step {best.step:,}" if best else ""
    held_out = Series("held out", evals, 2, "dots", mark=best.step if best else None, note=note)
    charts = [
        chart("Loss", [*train_loss_series(loss), held_out], wide=True),
        chart("Learning rate", [Series("learning rate", run.series("train/lr"), 1)], zero=True),
        chart("Gradient norm", [Series("gradient norm", run.series("train/grad_norm"), 1)]),
        chart("Tokens a second", [Series("tokens a second", run.series("train/tokens_per_second"), 1)], zero=True),
    ]
    charts = [c for c in charts if c]
    return h("div", *charts, class_="charts") if charts else None


def train_loss_series(loss: Sequence[Any]) -> list[Series]:
    """The logged loss, faint, under its moving average; alone where it is short."""
    if len(loss) < 25:
        return [Series("training", loss, 1)]
    return [Series("training", loss, 1, "faint"), Series("training, smoothed", smooth(loss), 1)]


def overfits_since(run: Run) -> int | None:
    """The step from which held-out loss rises while training loss falls, if two evaluations or more say so; or None."""
    best = run.best()
    later = [point for point in run.series("eval/loss") if best and point.step > best.step]
    train = smooth(run.series("train/loss"))
    before = [point.value for point in train if best and point.step <= best.step]
    if len(later) < 2 or not before or any(point.value <= 1.005 * best.value for point in later):
        return None
    return best.step if train[-1].value < before[-1] else None


def _overfitting(run: Run) -> Html | None:
    since = overfits_since(run)
    if since is None:
        return None
    told = f"Overfitting since step {since:,}: from there on held-out loss rises while training loss falls."
    kept = "The weights of that step are the result. More data, fewer steps or a lower rate may go further."
    return h("p", h("span", "finding", class_="badge flush bad"), f" {told} {kept}")


def _evaluations(run: Run) -> Html | None:
    keys = ("train/loss", "eval/loss", "eval/perplexity")
    columns = {key: dict(run.series(key)) for key in keys}
    steps = sorted(columns["eval/loss"])
    if len(steps) < 2:
        return None
    best = run.best()
    rows = []
    for step in steps:
        cells = [(columns[key][step], number(columns[key][step])) if step in columns[key] else "" for key in keys]
        rows.append([(step, f"{step:,}"), *cells, h("span", "best", class_="badge good") if step == best.step else ""])
    heads = ("step", "training loss", "held-out loss", "perplexity", "")
    return h("details", h("summary", "The evaluations as a table"), table(heads, rows, right=1, sortable=True))


# ------------------------------------------------------------------------------------------------------------ samples


def _samples(run: Run) -> Html | None:
    held_out = run.evaluation.get("held_out", {})
    answered = [s for s in held_out.get("samples", ()) if isinstance(s, dict) and "after" in s]
    samples = (answered or run.facts("samples", dict))[:MOST_SAMPLES]
    shown_before = any(sample.get("before") for sample in samples)
    cards = [_sample(sample, shown_before) for sample in samples]
    if not cards:
        return None
    more = cards[SHOWN_SAMPLES:]
    note = "Held-out prompts. Marked: where an answer that comes close says something else than the expected one."
    return join(
        [
            h("p", note, class_="note"),
            *cards[:SHOWN_SAMPLES],
            h("details", h("summary", f"{len(more)} more"), *more) if more else None,
        ]
    )


def _sample(sample: dict[str, Any], with_before: bool) -> Html:
    prompt, expected = sample.get("prompt"), sample.get("expected")
    columns = [] if expected is None else [h("div", h("h3", "expected"), h("pre", cut(expected)))]
    for name in ("before", "after") if with_before else ("after",):
        if name in sample:
            badge = _badge(expected, sample[name]) if expected is not None else None
            columns.append(h("div", h("h3", name, badge), _marked(expected, sample[name])))
    asked = None if prompt is None else join([h("h3", "prompt"), h("pre", cut(prompt))])
    return h("article", asked, h("div", *columns, class_="answers"), class_="sample")


def _badge(expected: Any, answer: Any) -> Html:
    right = str(expected).strip() == str(answer).strip() or _same_json(expected, answer)
    return h("span", "as expected" if right else "differs", class_=f"badge {'good' if right else 'bad'}")


def _same_json(a: Any, b: Any) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except (TypeError, ValueError):
        return False


def cut(value: Any) -> str:
    """A sample's text, whole unless it is very long."""
    value = str(value)
    rest = len(value) - LONGEST_SAMPLE
    return value if rest <= 0 else f"{value[:LONGEST_SAMPLE]} … ({rest:,} more characters)"


def _marked(expected: Any, answer: Any) -> Html:
    """The answer; if it is like the expected one, with the words marked that are not there."""
    if not str(answer).strip():
        return h("p", "(nothing)", class_="dim")
    if expected is None:
        return h("pre", cut(answer))
    old, new = (re.findall(r"\w+|\s+|[^\w\s]", cut(value)) for value in (expected, answer))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if matcher.ratio() < ALIKE:
        return h("pre", cut(answer))
    parts = []
    for kind, _, _, start, end in matcher.get_opcodes():
        piece = "".join(new[start:end])
        parts.append(piece if kind == "equal" or not piece.strip() else h("mark", piece))
    return h("pre", *parts)


# ----------------------------------------------------------------------------------------------- facts and how to go on


def how_to_load(run: Run) -> dict[str, str]:
    """Code to paste that loads the result: with what -> lines. Paths are as the run has them."""
    base = repr(str(run.settings["model.path"]))
    result = _result(run)
    here = repr(str(result))
    if result.name == "adapter":
        return {
            "peft": "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"base = {base}\n"
            f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), {here})\n"
            "tokenizer = AutoTokenizer.from_pretrained(base)",
            "jaxtune": f"import jaxtune\n\nmodule, params = jaxtune.load({base})\n"
            f"params, mask, config = jaxtune.load_adapter(module, params, {here})",
        }
    return {
        "transformers": "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({here})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({here})",
        "jaxtune": f"import jaxtune\n\nmodule, params = jaxtune.load({here})",
    }


def _result(run: Run) -> Path:
    """The exported directory: the one that is there, and before that the one that the method will write."""
    there = [run.folder / name for name in ("adapter", "model") if (run.folder / name).is_dir()]
    return there[0] if there else run.folder / ("adapter" if run.settings["tune.method"] in ADAPTERS else "model")


def _use(run: Run) -> Html:
    if not _result(run).is_dir():
        return h("p", "The run has not come to its end; its result will be in ", h("code", _result(run)), ".")
    generate = f"jaxtune generate {shlex.quote(str(run.folder))} --prompt='...'"
    lines = {"on the command line": generate, **{f"with {name}": code for name, code in how_to_load(run).items()}}
    return join(join([h("h3", title), snippet(code)]) for title, code in lines.items())


def reproduce(run: Run) -> list[Html]:
    """The command as it was typed, or what trains a point of a sweep alone; and one that takes every setting."""
    parts = []
    argv = run.facts("argv", str)
    if argv:
        title = "alone, outside the sweep" if "point" in run.summary else "as it was started"
        parts += [h("h3", title), snippet(shlex.join(argv))]
    config, workdir = run.folder / "config.json", run.folder.with_name(f"{run.name}-again")
    command = shlex.join(["jaxtune", "train", f"--config={config}", f"--workdir={workdir}"])
    return [*parts, h("h3", "with every setting of this run"), snippet(command)]


def shown(value: Any) -> str:
    """A setting's value in the words of the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return ", ".join(map(shown, value)) if isinstance(value, list | tuple) else str(value)


def settings_table(values: Mapping[str, Any]) -> Html | None:
    """Settings with their defaults and what they mean."""
    rows = [
        (h("code", path), h("code", shown(value)), h("code", _default(path), class_="dim"), _doc(path))
        for path, value in values.items()
    ]
    heads = ("setting", "value", "default", "meaning")
    return h("div", table(heads, rows), class_="settings") if rows else None


def _default(path: str) -> str:
    default = BY_PATH[path].default
    return "–" if default is None or default == {} else shown(default)


def _doc(path: str) -> Html:
    return h("span", BY_PATH[path].doc.removesuffix(" (required)"), class_="dim")


def _parameters(run: Run) -> Html | None:
    groups = {name: pair for name, pair in run.groups().items() if pair[1]}
    if not groups:
        return None
    rows = []
    for name, (trainable, total) in sorted(groups.items(), key=lambda item: -item[1][0]):
        share = trainable / total
        rows.append((h("code", name), (trainable, f"{trainable:,}"), (total, f"{total:,}"), (share, _bar(share))))
    return table(("module", "trained", "all", "share"), rows, right=1, sortable=True)


def _data(run: Run) -> Html | None:
    lines = run.facts("data", str)
    return h("ul", *(h("li", line) for line in lines)) if lines else None


def _times(run: Run) -> Html | None:
    parts = run.seconds_by_part()
    if not parts:
        return None
    total = sum(parts.values()) or 1.0
    rows = []
    for name, seconds in parts.items():
        rows.append((name, duration(seconds), _bar(seconds / total)))
    return table(("part", "time", "share"), rows, right=1)


def _bar(share: float) -> Html:
    return join([f"{100 * share:.1f}%", h("span", h("i", style=f"width:{100 * share:.1f}%"), class_="bar")])


def _versions(run: Run) -> Html | None:
    rows = [(name, h("code", text(version))) for name, version in run.versions.items()]
    return table(("package", "version"), rows) if rows else None
