"""Three sentences on a run: what they say of what was measured, and which command they name for what was not."""

import copy
import json

import pytest
from report_runs import make_run
from test_report_evaluation import EVALUATION, entry

from jaxtune.cli import main
from jaxtune.report.run import read_run
from jaxtune.report.verdict import keep_verdict, verdict

GENERAL = entry("loss on general text", (1.0, 0.9, 1.1), (1.5, 1.4, 1.6), "worse", 0.0005, share=False, better=-1)
SAME = GENERAL | {"verdict": "no evidence", "p": 0.6}
FLIPS = {"label": "exact match", "rows": 200, "right": {"base": 90, "tuned": 40}, "lost": 55, "gained": 5, "p": 1e-9}


def forgetting(loss, verdict):
    groups = {"notes": loss | {"rows": 90}, "stories": loss | {"rows": 110, "verdict": "no evidence"}}
    return {
        "rows": 200,
        "data": ["general.jsonl"],
        "metrics": {"loss": loss},
        "groups": {"column": "domain", "rows": {"notes": 90, "stories": 110}, "metrics": {"loss": groups}},
        "flips": {"exact_match": FLIPS | {"verdict": verdict}},
        "notes": [],
    }


def interval(value):
    return {"value": value, "low": value, "high": value}


FRONTIER = {
    "rows": 10,
    "general_rows": 10,
    "strengths": [0.0, 0.6, 1.0],
    "losses": {"task": [interval(v) for v in (3, 1.1, 1)], "general": [interval(v) for v in (1, 1.1, 1.5)]},
    "chosen": 0.6,
    "why": "At scale 0.6 the model keeps 95%.",
    "notes": [],
}
MEMORY = {
    "rows": 10,
    "held_out_rows": 10,
    "passes": 3.0,
    "membership": {"base": interval(0.5), "tuned": interval(0.9), "gain": interval(0.9)},
    "verbatim": [{"group": "once", "rows": 10, "base": 0, "tuned": 9}],
    "canaries": [{"times": 4, "count": 4, "base": 1.2, "tuned": 9.5, "p": 0.001}],
    "memorised": "yes",
    "why": "The model memorised: it goes on word for word in 9 of 10 training rows.",
    "notes": [],
}
QUIET = MEMORY | {"memorised": "no", "why": "No sign that the model memorised."}
CLEAN = copy.deepcopy(EVALUATION) | {"forgetting": forgetting(SAME, "no evidence"), "memory": QUIET}
CLEAN["held_out"]["metrics"].pop("exact_match")
CLEAN["held_out"].pop("groups")
NOTHING = {"held_out": {"rows": 200, "data": [], "metrics": {"loss": SAME}, "notes": []}}
LOST = CLEAN | {"forgetting": forgetting(GENERAL, "worse")}
ONE_DOMAIN = forgetting(SAME, "no evidence")
ONE_DOMAIN["groups"]["metrics"]["loss"]["notes"] = GENERAL | {"rows": 90}
WORSE = EVALUATION | {"memory": QUIET, "forgetting": CLEAN["forgetting"]}

CASES = {
    "all well": (CLEAN, "held-out loss 3.5 to 1.25 on 200 held-out rows", "nothing on 200 rows outside", "Use it."),
    "not measured": (
        {name: CLEAN[name] for name in ("held_out",)},
        "Better than the base",
        "(jaxtune eval {run} --forgetting=FILE does); nor is what it memorised (jaxtune eval {run} --memory).",
        "Measure what is missing",
    ),
    "forgot": (
        LOST,
        "Better than the base",
        "loss on general text 1 to 1.5; most of all notes (1 to 1.5); 55 answers turned from right to wrong and 5 back",
        "jaxtune eval {run} --frontier=FILE",
    ),
    "forgot in one domain": (
        CLEAN | {"forgetting": ONE_DOMAIN},
        "Better than the base",
        "Worse than the base: loss on notes (1 to 1.5).",
        "jaxtune eval {run} --frontier=FILE",
    ),
    "at a scale": (LOST | {"frontier": FRONTIER}, "Better", "general text", "jaxtune export {run} OUT --scale=0.6."),
    "memorised": (CLEAN | {"memory": MEMORY}, "Better", "word for word in 9 of 10 training rows.", "Do not publish it"),
    "no gain": (NOTHING, "Better than the base: nothing on 200 held-out rows", "--forgetting=FILE", "Keep the base"),
    "worse rows": (WORSE, "Better", "exact match 25.0% to 20.0%", "Look at the rows"),
    "nothing measured": ({}, "jaxtune eval {run}", "--forgetting=FILE", "Measure what is missing"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said(case, tmp_path, capsys):
    evaluation, *wanted = CASES[case]
    run = make_run(tmp_path / "quick")
    if evaluation:
        (run / "eval.json").write_text(json.dumps(evaluation))
    for sentence, words in zip(verdict(read_run(run)), wanted, strict=True):
        assert words.format(run=run) in sentence and sentence.count("..") == 0 and sentence.endswith((".", "FILE)."))
    assert main(["report", str(run)]) == 0
    said, page = capsys.readouterr().out, (run / "report.html").read_text()
    for sentence in verdict(read_run(run)):
        assert sentence in said
    assert "what to do" in page
    keep_verdict(run)
    assert json.loads((run / "summary.json").read_text())["verdict"] == verdict(read_run(run))._asdict()


@pytest.mark.parametrize(
    "part, key", [("forgetting", "flips"), ("frontier", "losses"), ("memory", "membership"), ("memory", "verbatim")]
)
def test_a_damaged_part_is_named(tmp_path, capsys, part, key):
    run = make_run(tmp_path / "quick")
    whole = {"forgetting": forgetting(GENERAL, "worse"), "frontier": FRONTIER, "memory": MEMORY}[part]
    (run / "eval.json").write_text(json.dumps({part: whole | {key: {"a": 3}}}))
    assert main(["report", str(run)]) == 2
    assert "eval.json is not what jaxtune eval writes" in capsys.readouterr().err
