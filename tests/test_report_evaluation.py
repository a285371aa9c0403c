"""eval.json on the page of a run, on its card and between runs: the figures, their places, broken files."""

import copy
import html
import json
import re

import pytest
from report_runs import DATA, HOSTILE, OVERRIDES, SUMMARY, Page, make_run

from jaxtune.cli import main
from jaxtune.errors import UserError
from jaxtune.hf.card import model_card, put_evaluation
from jaxtune.report import write_report
from jaxtune.report.card import evaluation_block, run_facts
from jaxtune.train import watch
from jaxtune.train.log import read_metrics


def cell(value, low, high):
    return {"value": value, "low": low, "high": high}


def entry(label, base, tuned, verdict, p, *, share, better=1, rows=200):
    difference = cell(tuned[0] - base[0], tuned[1] - base[2], tuned[2] - base[1])
    parts = {"base": cell(*base), "tuned": cell(*tuned), "difference": difference, "p": p, "verdict": verdict}
    return {"label": label, "better": better, "share": share, "rows": rows} | parts


LOSS = entry("held-out loss", (3.5, 3.0, 4.0), (1.25, 1.0, 1.5), "better", 0.0005, share=False, better=-1)
EXACT = entry("exact match", (0.25, 0.1, 0.4), (0.2, 0.1, 0.3), "worse", 0.04, share=True)
F1 = entry("words in common (F1)", (0.5, 0.4, 0.6), (0.51, 0.4, 0.62), "no evidence", 0.4321, share=True)
EVALUATION = {
    "held_out": {
        "data": ["data/eval.jsonl"],
        "rows": 200,
        "metrics": {"loss": LOSS, "exact_match": EXACT, "token_f1": F1},
        "groups": {
            "column": "language",
            "rows": {"de": 80, "en": 120},
            "metrics": {"exact_match": {"de": EXACT | {"rows": 80}, "en": EXACT | {"rows": 120}}},
        },
        "labels": {"names": ["ham", "spam"], "confusion": {"base": [[90, 10], [60, 40]], "tuned": [[95, 5], [7, 93]]}},
        "samples": [{"prompt": "Where is it?", "expected": "on the way", "before": "lost", "after": "on its way"}],
        "notes": ["3 of 203 rows have no prompt."],
    },
    "tasks": {
        "results": {"base": {"arc": {"acc": {"value": 0.5}}}, "tuned": {"arc": {"acc": {"value": 0.75, "stderr": 0.1}}}}
    },
}


@pytest.fixture
def run(tmp_path):
    folder = make_run(tmp_path / "quick")
    (folder / "eval.json").write_text(json.dumps(EVALUATION))
    return folder


def test_the_figures_are_those_of_the_file(run):
    page = Page(write_report(run))
    assert page.row("held-out loss")[2:] == ["3.5[3, 4]", "1.25[1, 1.5]", "−2.25[−3, −1.5]", "better (p < 0.001)"]
    assert page.row("exact match")[2:] == [
        "25.0%[10.0, 40.0]",
        "20.0%[10.0, 30.0]",
        "−5.0[−30.0, +20.0]",
        "worse (p = 0.040)",
    ]
    assert page.row("words in common (F1)")[-1] == "no evidence (p = 0.432)"
    assert page.row("de")[1] == "80" and page.row("en")[1] == "120"
    assert page.row("spam") == ["spam", "60", "40"]  # the base's table comes first
    assert page.row("arc") == ["arc", "acc", "0.5000", "0.7500 ± 0.1000"]
    assert "3 of 203 rows have no prompt." in page.text
    assert "Where is it?" in page.text and "two red mugs" not in page.text


def test_the_summary_has_three_sentences_and_counts_the_verdicts(run):
    lead = html.unescape(re.search(r'<p class="lead">(.*?)</p>', write_report(run).read_text())[1])
    said = (
        "on 200 held-out rows, 1 of 3 metrics are better than the base's, 1 worse, 1 without evidence of a difference."
    )
    assert said in lead
    assert len(re.findall(r"[.](?= |$)", lead)) == 3


def test_nothing_in_it_is_markup(run):
    evaluation = copy.deepcopy(EVALUATION)
    held = evaluation["held_out"]
    held["metrics"][HOSTILE] = EXACT | {"label": HOSTILE}
    held["groups"] = {"column": HOSTILE, "rows": {}, "metrics": {HOSTILE: {HOSTILE: EXACT}}}
    held["labels"]["names"] = [HOSTILE, "x"]
    held["samples"][0] = dict.fromkeys(("prompt", "expected", "before", "after"), HOSTILE)
    held["notes"] = [HOSTILE]
    evaluation["tasks"]["results"] = {HOSTILE: {HOSTILE: {HOSTILE: {"value": 1.0}}}}
    (run / "eval.json").write_text(json.dumps(evaluation))
    page = Page(write_report(run))
    assert not any(tag in ("img",) or "onerror" in attrs for tag, attrs in page.tags)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == len(page.scripts)
    assert all("alert" not in text for kind, text in page.scripts)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e["held_out"]["metrics"]["loss"].pop("label"),
        lambda e: e["held_out"]["metrics"]["loss"]["tuned"].update(value="low"),
        lambda e: e["held_out"]["metrics"]["loss"]["base"].update(high=float("nan")),
        lambda e: e["held_out"]["metrics"]["loss"].update(verdict="great"),
        lambda e: e["held_out"].update(rows="many"),
        lambda e: e["held_out"].update(metrics=[]),
        lambda e: e["tasks"].update(results={"base": {"a": {"acc": {"value": "x"}}}}),
    ],
)
def test_a_broken_file_is_named(run, change):
    evaluation = copy.deepcopy(EVALUATION)
    change(evaluation)
    (run / "eval.json").write_text(json.dumps(evaluation))
    with pytest.raises(UserError, match=r"eval\.json is not what jaxtune eval writes"):
        write_report(run)


def test_what_the_metrics_say_of_a_run_that_goes_on(tmp_path):
    lines = []
    for i, (held_out, train) in enumerate([(3.0, 3.0), (2.0, 2.0), (2.4, 1.0), (2.8, 0.5)]):
        lines += [{"step": 10 * i, "eval/loss": held_out, "train/loss": train}]
    [found] = watch.findings(lines)
    page = Page(write_report(make_run(tmp_path / "run", lines=lines, summary=None)))
    assert found.check == "overfitting" and found.message in page.text and f"step {found.step}" in page.text


def test_figures_of_an_earlier_step_are_left_out(run):
    for step, there in ((40, True), (39, False)):  # the run has 40
        evaluation = {"held_out": EVALUATION["held_out"] | {"step": step}}
        (run / "eval.json").write_text(json.dumps(evaluation))
        assert ("200 held-out rows" in Page(write_report(run)).text) is there


def test_the_card_says_the_same_once(tmp_path):
    card = tmp_path / "README.md"
    plain = model_card(name="adapter", base="b", adapter=True, notes=["A note."])
    card.write_text(plain)
    put_evaluation(card, evaluation_block(EVALUATION))
    first = card.read_text()
    assert "| held-out loss | 3.5 [3, 4] | 1.25 [1, 1.5] | −2.25 [−3, −1.5] | better (p < 0.001) |" in first
    assert "| arc | acc | 0.5000 | 0.7500 |" in first
    put_evaluation(card, evaluation_block(EVALUATION))
    assert card.read_text() == first
    head, _, rest = first.partition("<!-- evaluation -->")
    assert head + rest.partition("<!-- end of evaluation -->\n\n")[2] == plain


def test_the_card_tells_of_a_run_what_its_page_tells(run):
    summary = SUMMARY | {"findings": [{"step": 3, "check": "spikes", "message": "It spiked.", "fix": "Clip."}]}
    summary |= {"data_report": DATA, "cost": {"peak_bytes": 2**30, "peak_of": "device"}}
    config, lines = json.loads((run / "config.json").read_text()), read_metrics(run)
    facts = run_facts(config, lines, summary)
    assert facts["trained"] == "2.5% (2,500 of 100,000 parameters)" and facts["time"] == "1 min 32 s (TPU v9)"
    assert facts["held-out loss"] == "3.5 before, 1.25 after" and facts["peak memory"] == "1 GiB (of the device)"
    assert facts["found in the run, spikes"] == "It spiked. Clip."
    assert facts["found in the data, overlap"] == "2 rows (50.0%) of the evaluation data are known"
    assert "found in the data, length" not in facts, "a note"


def test_runs_are_compared_by_what_was_measured(tmp_path, capsys):
    runs = [make_run(tmp_path / name) for name in ("a", "b", "c")]
    other = copy.deepcopy(EVALUATION)
    other["held_out"]["metrics"]["loss"]["tuned"] = cell(0.5, 0.25, 0.75)
    for run, evaluation in zip(runs[:2], (EVALUATION, other), strict=True):
        (run / "eval.json").write_text(json.dumps(evaluation))
    assert main(["compare", *map(str, runs)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Not evaluated: c" in said and "different rows" not in said
    page = Page(tmp_path / "report.html")
    table = {row[0]: row[1:] for row in page.rows if "[" in "".join(row)}
    assert table["a"] == ["200", "1.25 [1, 1.5]", "20.0% [10.0, 30.0]", "51.0% [40.0, 62.0]"]
    assert table["b"][1] == "0.5 [0.25, 0.75]"
    other["held_out"]["rows"] = 100
    (runs[1] / "eval.json").write_text(json.dumps(other))
    assert main(["compare", *map(str, runs)]) == 0
    assert "different rows" in " ".join(capsys.readouterr().out.split())
    assert main(["compare", str(runs[0])]) == 2
    assert "two runs or more" in capsys.readouterr().err


WHISKERS = """
return [...document.querySelectorAll('#before-and-after .whiskers')].map(box => [...box.children].map(row => {
  const [whole, dot, bar] = [row, row.querySelector('b'), row.querySelector('i')].map(e => e.getBoundingClientRect());
  const place = x => (x - whole.left) / whole.width;
  return [place((dot.left + dot.right) / 2), place(bar.left), place(bar.right)];
}));
"""


def test_intervals_are_drawn_where_they_are(run, browser):
    """The loss over the span of its intervals, 1 to 4; a share from 0 to 1."""
    browser.open(write_report(run))
    loss, exact, _ = browser.driver.execute_script(WHISKERS)
    for got, want in zip(loss, [(3.5, 3, 4), (1.25, 1, 1.5)], strict=True):
        assert got == pytest.approx([(x - 1) / 3 for x in want], abs=0.01)
    for got, want in zip(exact, [(0.25, 0.1, 0.4), (0.2, 0.1, 0.3)], strict=True):
        assert got == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize("width", [360, 400, 600, 800, 900, 1200])
def test_a_verdict_is_seen_without_scrolling(run, browser, width):
    browser.open(write_report(run), width)
    for details in browser.driver.find_elements("css selector", "details"):
        browser.js_on(details, "arguments[0].open = true")
    seen = """e => {
      const [inner, box] = [e, e.closest('.box')].map(x => x.getBoundingClientRect());
      return inner.width > 0 && inner.left >= box.left && inner.right <= box.right + 1 && box.right <= innerWidth;
    }"""
    verdicts = browser.js(f"[...document.querySelectorAll('.results .verdict .badge')].map({seen})")
    assert verdicts == [True] * 5  # three metrics, two groups
    figures = browser.js(f"[...document.querySelectorAll('.results td .figure')].map({seen})")
    assert figures == [True] * 15


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_every_word_can_be_read(run, browser, width, dark):
    browser.open(write_report(run), width, dark=dark)
    for details in browser.driver.find_elements("css selector", "details"):
        browser.js_on(details, "arguments[0].open = true")
    assert browser.overflow() <= 0
    assert browser.contrast() > (4.5, "")
    assert browser.errors() == []


def test_a_table_too_wide_for_the_terminal_is_turned(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "140")
    long = "a/rather/long/path/of/a/file/that/takes/half/of/a/line.jsonl"
    others = OVERRIDES | {"data": {"train": long, "eval": long}, "model": {"path": long}}
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", others)]
    assert main(["compare", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert any("data.train" in line and long in line for line in out.splitlines())
    assert any(line.split()[1:2] == ["run"] and "one" in line and "two" in line for line in out.splitlines())
