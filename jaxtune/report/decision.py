"""The page of a decision: the sentence, score against cost with the Pareto front, the learning curve, the matrix."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError
from jaxtune.reading import read_json
from jaxtune.report.chart import Chart, Key, Series, chart
from jaxtune.report.compare import Cell, Ranked, cell, used
from jaxtune.report.render import render
from jaxtune.report.run import Measured
from jaxtune.report.words import duration, number, percent

COLOURS = {"prompt": 1, "neighbours": 3, "tuned": 2}
SIDES = {"prompt": "prompts", "neighbours": "nearest rows", "tuned": "tuned"}


def write_decision(folder: Path) -> Path:
    """Write decision.html beside decision.json.

    Raises:
        UserError: decision.json is missing or damaged.
    """
    from jaxtune.files import atomic_write_text

    file = folder / "decision.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no decision (no decision.json); run jaxtune decide --workdir={folder}.")
    report = read_json(file)
    try:
        page = decision_page(report, folder.name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file} is not what jaxtune decide writes ({type(error).__name__}: {error}); run it again."
        ) from None
    atomic_write_text(folder / "decision.html", page)
    return folder / "decision.html"


def decision_page(report: Mapping[str, Any], title: str) -> str:
    """The HTML of a decision."""
    heads, rows = matrix(report)
    return render(
        "decision.html",
        title=title,
        kind=f"prompt or tune · {Path(report['model']).name}",
        summary=[report["sentence"]],
        heads=heads,
        rows=rows,
        charts=[c for c in (score_over_cost(report), learning_curve(report)) if c],
        curve=curve_lines(report.get("curve")),
        notes=report["notes"],
        facts=(
            f"{report['held_out']:,} held-out rows, {report['pool']:,} others, by {report['metric']}; "
            f"{duration(report['seconds'])} on {report['device']}."
        ),
    )


def matrix(report: Mapping[str, Any]) -> tuple[list[str], list[Ranked]]:
    """(heads, a row for each candidate, the best score first)."""
    unit = report["price"]["unit"]
    heads = [
        "candidate",
        "score",
        "against the best untrained",
        "tokens a request",
        "latency",
        f"1,000 requests ({unit})",
    ]
    heads += [f"training ({unit})", "pays after", "rows needed", "general text", "front", ""]
    ordered = sorted(report["matrix"], key=lambda row: -row["score"]["value"])
    cells = [[row["name"], *_cells(row)] for row in ordered]
    heads, cells = used(heads, cells)
    best = {report["tuned"] if report["verdict"] == "tune" else report["prompt"]}
    return heads, [
        Ranked(own[0], None, COLOURS[row["side"]], own[1:], best=row["name"] in best)
        for row, own in zip(ordered, cells, strict=True)
    ]


def _cells(row: Mapping[str, Any]) -> list[Cell]:
    even = row.get("break_even")
    tokens = row["read"] + row["written"]
    return [
        (row["score"]["value"], interval(row["score"])),
        (row["difference"]["value"], interval(row["difference"], sign=True)) if "difference" in row else "",
        (tokens, f"{row['read']:,.0f} + {row['written']:,.0f}") if tokens else "",
        (row["latency"], _seconds(row["latency"])),
        cell(row["cost_of_1000"]),
        cell(row["cost_of_training"] or None),
        cell(even, lambda n: f"{n:,.0f}") if row["side"] == "tuned" and even is not None else "",
        cell(row["needs"] or None, "{:,}".format),
        forgotten(row.get("forgetting")),
        "yes" if row["pareto"] else "",
        row["stopped"] or "",
    ]


def forgotten(part: Mapping[str, Any] | None) -> Cell:
    """What a tuned model lost on general text: its loss, and answers that turned wrong and right."""
    if part is None:
        return ""
    loss = part["loss"]
    shown = f"{loss['value']:+.3f} nats"
    if loss["low"] is not None:
        shown += f" [{loss['low']:.3f}, {loss['high']:.3f}]"
    if part["lost"] is not None:
        shown += f"; {part['lost']:,} answers lost, {part['gained']:,} gained"
    return loss["value"], shown


def interval(value: Mapping[str, Any], sign: bool = False) -> str:
    """A share with its interval, in percent."""
    shown = f"{100 * value['value']:+.1f}" if sign else percent(value["value"])
    if value["low"] is None:
        return shown
    return f"{shown} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def score_over_cost(report: Mapping[str, Any]) -> Chart | None:
    """Each candidate's score over the cost of 1,000 requests, and a line through those that no other beats."""
    rows = sorted(report["matrix"], key=lambda row: row["cost_of_1000"])
    front = [Measured(row["cost_of_1000"], row["score"]["value"]) for row in rows if row["pareto"]]
    points = [
        Series(row["name"], [Measured(row["cost_of_1000"], row["score"]["value"])], COLOURS[row["side"]])
        for row in rows
    ]
    unit = report["price"]["unit"]
    by = f"cost of 1,000 requests ({'seconds' if unit == 's' else unit})"
    drawn = chart("Score over cost", [Series("no other is better and as cheap", front, 0), *points], by=by, wide=True)
    sides = {row["side"] for row in rows}
    keys = [Key(SIDES[side], colour, "dots") for side, colour in COLOURS.items() if side in sides]
    return drawn and replace(drawn, legend=[*keys, Key("no other is better and as cheap", 0)])


def learning_curve(report: Mapping[str, Any]) -> Chart | None:
    """LoRA's score over its training rows, with the fitted power law, its interval and the best prompt."""
    curve = report.get("curve")
    if not curve or not curve["holds"]:
        return None
    measured = [Measured(r["needs"], r["score"]["value"]) for r in report["matrix"] if r["name"].startswith("LoRA on ")]
    ends = [
        Series(name, [Measured(line[0], line[at]) for line in curve["line"]], 2, "faint")
        for name, at in (("lower end", 2), ("upper end", 3))
    ]
    series = [*ends, Series("power law", [Measured(n, value) for n, value, *_ in curve["line"]], 2)]
    series.append(Series("measured", measured, 4, "dots"))
    prompt = next((r["score"]["value"] for r in report["matrix"] if r["name"] == report["prompt"]), None)
    if prompt is not None:
        last = curve["line"][-1][0]
        series.append(Series("best untrained", [Measured(curve["line"][0][0], prompt), Measured(last, prompt)], 1))
    return chart("Score over training rows", series, by="rows", wide=True)


def curve_lines(curve: Mapping[str, Any] | None) -> list[str]:
    """Sentences on the learning curve."""
    if not curve:
        return []
    if not curve["holds"]:
        return ["LoRA's scores are no power law of its rows, so that nothing is extrapolated."]
    found = [f"{int(n):,} rows: {interval(score)} by the power law." for n, score in curve["with_more_rows"].items()]
    needed = curve.get("rows_to_equal_the_prompt")
    if needed and needed["value"] is not None:
        high = "no number of rows" if needed["high"] is None else f"{needed['high']:,.0f}"
        found.append(
            f"As good as the best untrained with {number(needed['value'])} rows [{needed['low'] or 0:,.0f}, {high}]."
        )
    return found
