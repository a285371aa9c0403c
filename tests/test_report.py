"""Reports of made-up runs: they say what is in the files, stand alone, and show no markup that a run brings in."""

import html
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from report_runs import DATA, HOSTILE, OVERRIDES, SUMMARY, Page, make_run, metrics

from jaxtune.cli import main
from jaxtune.errors import UserError
from jaxtune.report import write_comparison, write_report
from jaxtune.report.chart import linear_axis, log_axis, smooth, step_axis, thin
from jaxtune.report.run import Measured, read_run
from jaxtune.report.words import compact, duration, number, percent


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "quick")


def test_the_figures_are_those_of_the_run(run):
    assert write_report(run) == run / "report.html"
    page = Page(run / "report.html")
    assert "LoRA adapters (rank 16, alpha 8, on all linear layers) for tiny/base were tuned on train.jsonl" in page.text
    assert "for 40 steps: 2,500 of 100,000 parameters, 2.5%." in page.text
    assert "Held-out loss fell from 3.5 before tuning to 1.25 at step 20 and ended at 2.4" in page.text
    assert "every JSON field right went from 0% to 91.5%." in page.text
    assert "It took 1 min 32 s and read 4,000 tokens at 1,234 tokens a second on TPU v9." in page.text
    assert page.row("held-out loss") == ["held-out loss", "", "3.5", "1.25", "−2.25"]
    assert page.row("valid JSON") == ["valid JSON", "", "0.0%", "99.0%", "+99.0"]
    assert page.row("tune.lora.r") == ["tune.lora.r", "16", "8", "rank"]
    assert page.row("mlp/up_proj") == ["mlp/up_proj", "2,500", "40,000", "6.2%"]
    assert "jax 9.8.7" in page.text
    assert page.row("train") == ["train", "1 min 10 s", "76.1%"]
    assert "data/train.jsonl: 123 rows" in page.text
    assert not any(row and row[0] == "optim.lr" for row in page.rows), "a setting at its default"


def test_the_curves_are_those_of_the_metrics(run):
    charts = Page(write_report(run)).charts()
    assert list(charts) == ["Loss", "Learning rate", "Gradient norm", "Tokens a second"]
    assert charts["Loss"]["training"] == {step: 4 - step / 20 for step in range(1, 41)}
    assert charts["Loss"]["held out"] == {0: 3.5, 10: 2.1, 20: 1.25, 30: 2.3, 40: 2.4}
    assert set(charts["Learning rate"]["learning rate"].values()) == {1e-3}


def test_points_are_drawn_where_their_values_are(run):
    """The best evaluation's ring: step 20 of 0..40 is half way; the loss axis says where 1.25 is."""
    page = Page(write_report(run))
    svg = page.source.partition("<svg")[2].partition("</svg>")[0]
    x, y = map(float, re.search(r'class="ring c2" d="M([\d.]+) ([\d.]+)h0"', svg).groups())
    figure = page.source.partition("</figure>")[0]
    ticks = {float(v): float(top) for top, v in re.findall(r'class="ty" style="top:([\d.]+)%">([\d.]+)<', figure)}
    assert x == 500
    assert {0.0, 4.0} <= set(ticks)
    assert y / 10 == pytest.approx(ticks[4.0] + (ticks[0.0] - ticks[4.0]) * (4 - 1.25) / 4, abs=0.1)


@pytest.mark.security
def test_the_page_stands_alone(run):
    for page in (Page(write_report(run)), Page(write_comparison([run, make_run(run.parent / "other")]))):
        assert page.source.startswith("<!doctype html>")
        assert ("meta", {"charset": "utf-8"}) in page.tags
        for _, attributes in page.tags:
            assert not {"src", "srcset", "action", "onclick"} & set(attributes)
            assert re.fullmatch(r"data:,|quick/report\.html|#[a-z-]+", attributes.get("href", "data:,"))
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", page.source)
        policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'")


def test_samples_are_judged_and_their_differences_marked(run):
    source = write_report(run).read_text(encoding="utf-8")
    cards = re.findall(r"<article.*?</article>", source, re.DOTALL)
    assert len(cards) == 2
    assert cards[0].count("as expected") == 1, "JSON in another order is the same"
    assert cards[1].count("differs") == 2
    assert re.findall(r"<mark>(.*?)</mark>", cards[1]) == ["pink"]
    assert re.findall(r"<mark class=missed>(.*?)</mark>", cards[1]) == ["blue"]
    assert "(nothing)" in cards[1]


def test_what_the_summary_lacks_is_left_out(tmp_path):
    page = Page(write_report(make_run(tmp_path / "run", summary=None)))
    assert "40 steps. Held-out loss fell" in page.text
    assert "It read 4,000 tokens at 1,234 tokens a second." in page.text
    for heading in ("Samples", "Trained parameters", "Where the time went", "Data"):
        assert f"<h2>{heading}</h2>" not in page.source
    assert "None" not in page.text
    assert f"its result will be in {tmp_path / 'run' / 'adapter'} ." in page.text


@pytest.mark.parametrize("tail", ['{"step": 41, "train/lo', '{"step": 41, "train/loss": 1e', "{", "\n\n"])
def test_a_torn_last_line_changes_nothing(run, tail):
    whole = write_report(run).read_text(encoding="utf-8")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(tail)
    assert write_report(run).read_text(encoding="utf-8") == whole


@pytest.mark.security
def test_nothing_in_a_run_is_markup(tmp_path):
    overrides = {
        "model": {"path": HOSTILE.replace("\x00\ud800", "")},
        "tune": {"lora": {"target_modules": ("</td><script>alert(3)</script>",)}},
        "data": {"train": "</title><script>alert(4)</script>.jsonl", "template": "{a}</pre><svg onload=alert(5)>"},
    }
    summary = {
        "device": HOSTILE,
        "data": [HOSTILE],
        "groups": {HOSTILE: [1, 2]},
        "seconds": {HOSTILE: 1.0},
        "argv": ["jaxtune", "train", HOSTILE],
        "samples": [{"prompt": HOSTILE, "expected": "x " + HOSTILE, "before": HOSTILE, "after": HOSTILE + " y"}],
    }
    lines = [*metrics(), {"step": 40, "eval/" + HOSTILE: 1.0, "phase": "after"}]
    run = make_run(tmp_path / "<" / "script><script>alert(6)", overrides, lines, summary)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"versions": {HOSTILE: HOSTILE}}))
    page = Page(write_report(run))
    plain = Page(write_report(make_run(tmp_path / "plain")))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert not {"onerror", "onload"} & {name for _, attributes in page.tags for name in attributes}
    assert sum(tag == "script" for tag, _ in page.tags) == sum(tag == "script" for tag, _ in plain.tags)
    assert page.text.count("<script>alert(1)</script>") > 10, "said as text"
    together = write_comparison([run, tmp_path / "plain"])
    assert "</script><script>alert(6)" in Page(together).charts()["Held-out loss"]
    for file in (run / "report.html", together):
        assert "<script>alert" not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ([3.0, 3.5, 4.0], "Held-out loss never fell below the 3 before tuning and ended at 4."),
        ([3.0, 2.5, 2.0], "Held-out loss fell from 3 before tuning to 2 at step 2."),
        ([3.0, float("nan"), 2.0], "Held-out loss fell from 3 before tuning to 2 at step 2."),
    ],
)
def test_the_loss_in_words(tmp_path, loss, said):
    lines = [{"step": step, "eval/loss": value} for step, value in enumerate(loss)]
    assert said in Page(write_report(make_run(tmp_path / "run", lines=lines))).text


def test_without_held_out_data_the_training_loss_is_told(tmp_path):
    lines = [line for line in metrics() if "train/loss" in line]
    page = Page(write_report(make_run(tmp_path / "run", lines=lines)))
    assert "Training loss fell from 3.95 (step 1) to 2 (step 40); there was no held-out data." in page.text
    assert "<h2>Before and after</h2>" not in page.source


def test_lines_may_say_before_and_after(tmp_path):
    lines = [
        {"step": 40, "phase": "after", "eval/loss": 9.0, "eval/json_valid": 0.5},
        {"step": 0, "phase": "before", "eval/loss": 8.0, "eval/json_valid": 0.75},
        {"step": 40, "eval/loss": 7.0},
    ]
    page = Page(write_report(make_run(tmp_path / "run", lines=lines)))
    assert page.row("held-out loss") == ["held-out loss", "", "8", "9", "+1"]
    assert page.row("valid JSON") == ["valid JSON", "", "75.0%", "50.0%", "−25.0"]
    assert page.charts()["Loss"]["held out"] == {0: 8.0, 40: 7.0}


def test_what_to_paste(run):
    def snippets():
        return list(map(html.unescape, re.findall(r"<pre>(.*?)</pre>", write_report(run).read_text(), re.DOTALL)))

    loading = next(text for text in snippets() if "PeftModel." in text)
    assert f"{run}/adapter" in loading and "models/tiny/base" in loading
    compile(loading, "snippet", "exec")
    assert "jaxtune train '--config=my config.py'" in snippets()
    assert f"jaxtune train --config={run}/config.json --workdir={run}-again" in snippets()
    (run / "adapter").rename(run / "model")
    assert not any("PeftModel" in text for text in snippets()), "what was exported decides"


def test_what_was_found_in_the_data(run):
    (run / "data_report.json").write_text(json.dumps(DATA))
    page = Page(write_report(run))
    assert "error 2 rows (50.0%) of the evaluation data are known leave them out" in page.text
    assert "data/eval.jsonl:3 = data/train.jsonl:7" in page.text and "note 4 rows are long raise it" in page.text
    assert "tokens 1,000, of them 250 (25%) trained" in page.text
    assert "limit 64 tokens: 4 rows are longer and dropped" in page.text
    bars = re.findall(r'<div class="c(\d)" title="(.*?)"><i style="height:([\d.]+)%', page.source)
    assert [(colour, float(height)) for colour, _, height in bars] == [("1", 50), ("1", 100), ("1", 30), ("1", 20)]
    assert bars[-1][1] == "60 to 79 tokens: 4 rows"
    assert re.findall(r"<li><span>(..)</span>.*?width:([\d.]+)%", page.source) == [("en", "100.0"), ("de", "20.0")]
    assert re.findall(r'<pre>Q <mark class="trained">A</mark></pre>', page.source)
    assert "This is what training saw" not in page.text


def test_bars_beyond_the_limit_have_another_colour(run):
    lengths = DATA["summary"]["lengths"] | {"edges": [0, 32, 65, 97, 129]}
    (run / "data_report.json").write_text(json.dumps(DATA | {"summary": DATA["summary"] | {"lengths": lengths}}))
    source = write_report(run).read_text()
    assert re.findall(r'<div class="c(\d)" title', source) == ["1", "1", "2", "2"]
    assert "beyond 64" in source


def test_training_itself_sees_some_of_it(tmp_path):
    run = make_run(tmp_path / "run", summary=SUMMARY | {"data_report": DATA | {"findings": [], "glance": True}})
    page = Page(write_report(run))
    assert "Nothing was found to be wrong with it. This is what training saw on its way." in page.text
    (run / "data_report.json").write_text(json.dumps(DATA))
    assert "This is what training saw" not in Page(write_report(run)).text, "jaxtune data sees more"


@pytest.mark.parametrize("broken", [{"summary": {}}, DATA | {"findings": [{"check": "x"}]}, DATA | {"samples": 3}])
def test_a_broken_report_on_data_is_named(run, broken):
    (run / "data_report.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match="is not what jaxtune data writes"):
        write_report(run)


def test_what_the_run_noticed(tmp_path):
    found = [
        {"step": 30, "severity": "warning", "check": "spikes", "message": "The loss spiked.", "fix": "Clip gradients."},
        {"step": 7, "severity": "odd", "message": "<b>", "fix": None},
        "no object",
    ]
    page = Page(write_report(make_run(tmp_path / "run", summary=SUMMARY | {"findings": found})))
    assert "warning The loss spiked. Clip gradients. since step 30 note <b> since step 7 Before and after" in page.text
    quiet = make_run(tmp_path / "quiet", summary=SUMMARY | {"findings": []})
    assert "<h2>Findings</h2>" not in write_report(quiet).read_text()


def test_what_it_cost(tmp_path):
    cost = {"flops": 7e13, "peak_bytes": 3 * 2**29, "peak_of": "device", "runs": 2}
    page = Page(write_report(make_run(tmp_path / "run", summary=SUMMARY | {"cost": cost})))
    assert "Operations 70 TFLOP 17.5 GFLOP a token, 1 TFLOP/s while training" in page.text  # 4,000 tokens in 70 s
    assert "Peak memory 1.5 GiB of the device, with 2 runs" in page.text
    assert "Operations" not in Page(write_report(make_run(tmp_path / "old"))).text


def test_scores_with_intervals_stand_in_for_plain_ones(tmp_path):
    cells = {name: {"value": v, "low": v - 0.1, "high": v + 0.1} for name, v in (("base", 0.2), ("tuned", 0.8))}
    entry = cells | {"difference": {"value": 0.6, "low": 0.5, "high": 0.7}, "p": 0.0004, "verdict": "better"}
    entry |= {"label": "every field right", "better": 1, "share": True, "rows": 200}
    page = Page(write_report(make_run(tmp_path / "run", summary=SUMMARY | {"scores": {"json_exact": entry}})))
    row = page.row("every field right")
    assert row[2:] == ["20.0%[10.0, 30.0]", "80.0%[70.0, 90.0]", "+60.0[+50.0, +70.0]", "better (p < 0.001)"]
    assert page.row("held-out loss")[2:] == ["3.5", "1.25", "−2.25", ""]
    with pytest.raises(UserError, match=r"summary\.json: its scores"):
        write_report(make_run(tmp_path / "broken", summary=SUMMARY | {"scores": {"json_exact": {}}}))


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ({"method": "full"}, "All weights of tiny/base were tuned"),
        ({"method": "last_n", "last_n": {"layers": 3}}, "The last 3 layers of tiny/base were tuned"),
        ({"method": "regex", "regex": {"pattern": "50%s.*"}}, "The parameters that match 50%s.* of tiny/base were"),
        ({"method": "prompt_tuning", "prompt_tuning": {"num_virtual_tokens": 9}}, "9 virtual tokens for tiny/base"),
        ({"lora": {"use_dora": True}}, "DoRA adapters (rank 8, alpha 8, on all linear layers) for tiny/base were"),
    ],
)
def test_the_method_in_words(tmp_path, tune, said):
    assert said in Page(write_report(make_run(tmp_path / "run", OVERRIDES | {"tune": tune}))).text


def test_a_classifier_is_loaded_as_one(tmp_path):
    overrides = {key: section for key, section in OVERRIDES.items() if key != "evaluate"}
    overrides |= {"objective": {"name": "sequence_classification"}}
    source = write_report(make_run(tmp_path / "run", overrides)).read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in source
    assert "CausalLM" not in source and "jaxtune generate" not in source


# --------------------------------------------------------------------------------------------------- several runs


def test_several_runs_on_one_page(tmp_path):
    rates = {"a": 1e-4, "b": 1e-3, "c": 1e-2}
    for name, lr in rates.items():
        lines = metrics()
        lines[1] = {"step": 0, "eval/loss": 3.5}
        lines += [{"step": 20, "eval/loss": 1.0 + abs(lr - 1e-3) * 10}]
        make_run(tmp_path / "sweep" / name, OVERRIDES | {"optim": {"lr": lr}}, lines)
    write_report(tmp_path / "sweep" / "b")
    out = write_comparison([tmp_path / "sweep" / name for name in rates])
    assert out == tmp_path / "sweep" / "report.html"
    page = Page(out)
    assert "The runs differ in optim.lr. b has the lowest held-out loss, 1 at step 20." in page.text
    assert page.rows[0][:4] == ["run", "held-out loss", "at step", "training loss"]
    assert [row[0] for row in page.rows[1:]] == ["b", "a", "c"]
    assert dict(zip(page.rows[0], page.row("a")))["optim.lr"] == "1e-4"
    assert page.row("a")[1:3] == ["1.009", "20"]
    assert page.links() == ["b/report.html"]
    charts = page.charts()
    assert set(charts["Held-out loss"]) == set(charts["Training loss, smoothed"]) == set(rates)
    assert charts["Held-out loss"]["a"][20] == pytest.approx(1.009)


def test_the_best_eight_of_many_runs_have_a_colour(tmp_path):
    runs = []
    for i in range(11):
        lines = [{"step": 0, "eval/loss": 50.0}, {"step": 1, "eval/loss": 1.0 + (i * 7) % 11}]
        runs.append(make_run(tmp_path / f"run{i}", OVERRIDES | {"train": {"steps": 1, "seed": i}}, lines))
    source = write_comparison(runs).read_text()
    colours = {s["name"]: s["colour"] for s in json.loads(re.search(r'json">(.*?)</script>', source)[1])["series"]}
    assert sorted(colours.values()) == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert all((colour == 0) == ((int(name[3:]) * 7) % 11 >= 8) for name, colour in colours.items())


# ------------------------------------------------------------------------------------------------- the command, errors


def test_the_command(run, tmp_path, capsys):
    other = make_run(tmp_path / "other")
    assert main(["report", str(run)]) == 0
    assert main(["report", str(run), str(other)]) == 0
    assert main(["report", str(run), str(other), f"--out={tmp_path / 'both.html'}"]) == 0
    pages = [run / "report.html", tmp_path / "report.html", tmp_path / "both.html"]
    out = capsys.readouterr().out.splitlines()
    assert [out[0], *out[4:]] == list(map(str, pages))  # of one run, three sentences follow
    assert all(page.is_file() for page in pages)
    assert not list(tmp_path.rglob("*.tmp"))


def refused(capsys, *argv):
    assert main(["report", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("jaxtune: error: ") and "Traceback" not in err
    return err


def test_what_is_refused(run, tmp_path, capsys):
    assert "RUN is missing" in refused(capsys)
    assert "no such directory" in refused(capsys, tmp_path / "nowhere")
    assert f"It holds runs; give those: {run}" in refused(capsys, tmp_path)
    assert "is given twice" in refused(capsys, run, run.parent / "." / run.name)
    assert "ends in .html" in refused(capsys, run, f"--out={run / 'config.json'}")
    assert "there is no directory" in refused(capsys, run, f"--out={tmp_path / 'no' / 'a.html'}")
    (run / "metrics.jsonl").write_text('{"step": 1')
    assert "no step is logged yet" in refused(capsys, run)
    (run / "metrics.jsonl").unlink()
    assert "it has no metrics.jsonl" in refused(capsys, run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": "\\'])
def test_a_broken_summary_is_named(run, text):
    (run / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json:"):
        write_report(run)


def test_values_of_other_types_are_left_out(tmp_path):
    summary = {"trainable": "many", "all": None, "groups": [1], "seconds": "long", "device": 7, "data": {}, "argv": [1]}
    lines = [{"step": 1, "train/loss": "high"}, {"step": "2"}, ["step"], 3, {"step": 2, "train/loss": 1.0}]
    run = make_run(tmp_path / "run", lines=lines, summary=summary | {"samples": ["x", {}]})
    assert read_run(run).series("train/loss") == [(2, 1.0)]
    Page(write_report(run))


def test_a_report_needs_no_jax(run):
    code = (
        "import sys; from jaxtune.report import write_report; write_report(sys.argv[1]);"
        "assert not {'jax', 'numpy', 'transformers', 'ml_collections', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, cwd=Path(__file__).parent.parent)


# --------------------------------------------------------------------------------------------------- charts, numbers


def test_axes_hold_their_values_between_round_ticks():
    for values in ([0.06, 3.4], [3.0, 3.0], [0.0, 0.0], [-2.0, 5.0], [1e-7, 1e7], [99.0, 101.0]):
        axis = linear_axis(values)
        assert axis.lo <= min(values) and max(values) <= axis.hi and 2 <= len(axis.ticks) <= 12
    for values in ([0.06, 3.4], [2.0, 2.0], [1e-9, 1e9], [1e-300, 1e300]):
        axis = log_axis(values)
        assert axis.lo <= min(values) and max(values) <= axis.hi and 1 <= len(axis.ticks) <= 8
        assert 0 <= axis.at(values[0]) <= axis.at(values[1]) <= 1
    assert step_axis([0, 240]).ticks == (0, 50, 100, 150, 200)
    assert step_axis([7]).ticks == (7,)


def test_smoothing_has_no_lag_at_the_start_and_keeps_a_constant():
    assert smooth([Measured(1, 8.0)]) == [(1, 8.0)]
    assert [p.value for p in smooth([Measured(i, 2.5) for i in range(500)])] == pytest.approx([2.5] * 500)


def test_thinning_keeps_the_ends_and_the_spikes():
    points = [Measured(i, 1.0 + i % 7) for i in range(10_000)]
    points[4_321] = Measured(4_321, 99.0)
    points[8_765] = Measured(8_765, -99.0)
    kept = thin(points, 600)
    assert len(kept) <= 600
    assert {points[0], points[-1], points[4_321], points[8_765]} <= set(kept)
    assert kept == sorted(kept)


def test_numbers_in_words():
    assert list(map(number, (3.41234, 0.0002, 12345.6, 0.0))) == ["3.412", "2e-4", "12,346", "0"]
    assert [compact(v, 2e-3) for v in (0, 5e-4, 2e-3)] == ["0", "0.0005", "0.002"]
    assert [compact(v, 2e-4) for v in (0, 5e-5, 2e-4)] == ["0", "5e-5", "2e-4"]
    assert [compact(v, 2e6) for v in (5e3, 2e4, 2e6)] == ["5,000", "20k", "2M"]
    assert list(map(percent, (0.0, 0.915, 1.0, 1e-6))) == ["0%", "91.5%", "100%", "below 0.01%"]
    assert list(map(duration, (45.23, 59.97, 92, 3599.7, 11100))) == [
        *("45.2 s", "1 min 00 s", "1 min 32 s", "1 h 00 min", "3 h 05 min"),
    ]


# -------------------------------------------------------------------------------------------------------- in a browser


def test_the_read_out_and_the_sorting(run, browser):
    page = write_report(run)
    browser.open(page)
    tip = browser.find(".tip")
    browser.hover(browser.find(".plot"))
    said = tip.text.split()
    assert (said[:4], said[-3:]) == (["step", "20", "training", "3"], ["held", "out", "1.25"])
    browser.press(browser.find(".plot"), "END")
    assert tip.text.split()[:4] == ["step", "40", "training", "2"]
    browser.press(browser.find(".plot"), "ARROW_LEFT")
    assert tip.text.split()[:2] == ["step", "39"]
    browser.hover(browser.find("h1"))
    assert not tip.is_displayed()
    browser.find("#curves details summary").click()
    up, down = [], []
    for found in (up, down):
        browser.find("#curves th:nth-child(3) button").click()
        found += [cell.text for cell in browser.driver.find_elements("css selector", "#curves tbody td:nth-child(3)")]
    assert up == ["1.25", "2.1", "2.3", "2.4", "3.5"] and down == up[::-1]
    assert browser.requests() - {"data:,"} == {page.as_uri()}
    assert browser.errors() == []


def test_what_to_paste_is_copied_or_selected(run, browser):
    browser.open(write_report(run))
    snippet = browser.find("#do-it-again .snippet")
    button = snippet.find_element("css selector", "button")
    button.click()
    deadline = time.monotonic() + 5
    while button.text == "copy" and time.monotonic() < deadline:
        pass
    assert button.text in ("copied", "selected")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_every_word_can_be_read(run, browser, width, dark):
    (run / "data_report.json").write_text(json.dumps(DATA))
    browser.open(write_report(run), width, dark=dark)
    for details in browser.driver.find_elements("css selector", "details"):
        browser.js_on(details, "arguments[0].open = true")
    assert browser.overflow() <= 0
    assert browser.contrast() > (4.5, "")
    background = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 60) is dark
    assert browser.find("nav").is_displayed() is (width > 1000)
    assert browser.errors() == []


def test_no_script_but_its_own_runs(run, browser):
    """The policy holds even for markup that would have slipped in."""
    page = write_report(run)
    source = page.read_text().replace("<main>", "<main><img src=x onerror='window.ran=1'><script>window.ran=1</script>")
    page.write_text(source)
    browser.open(page)
    assert browser.js("window.ran === undefined")
    assert browser.find(".copy").is_displayed(), "its own has run"
    assert browser.errors() != []


def test_the_base_is_no_result(tmp_path):
    lines = [{"step": step, "eval/loss": loss} for step, loss in ((0, 3.0), (10, 3.5), (20, 4.0))]
    run = read_run(make_run(tmp_path / "worse", lines=lines))
    assert run.best() == (10, 3.5)
    assert (run.before()["eval/loss"], run.after()["eval/loss"]) == (3.0, 3.5)
    begun = make_run(tmp_path / "begun", lines=lines[:1], summary=None)
    assert read_run(begun).best() is None
    assert "Held-out loss is 3 at step 0" in Page(write_report(begun)).text


def test_what_was_generated_at_evaluations_is_shown_if_nothing_else_was(run, tmp_path):
    lines = [
        {"step": step, "prompt": prompt, "expected": "13 mugs", "text": f"{step} {prompt[-4:]}"}
        for step in (0, 10, 20)
        for prompt in ("how many mugs", "and how many cups")
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "pro'
    (run / "samples.jsonl").write_text(text)
    assert "0 mugs" not in Page(write_report(run)).text  # of those that the run scored there are more
    bare = make_run(tmp_path / "bare", summary={name: v for name, v in SUMMARY.items() if name != "samples"})
    (bare / "samples.jsonl").write_text(text)
    page = Page(write_report(bare)).text
    assert "how many mugs expected 13 mugs before differs 0 mugs after differs 20 mugs" in page
    assert "10 mugs" not in page
