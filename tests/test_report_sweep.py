"""The page of a sweep: made-up sweeps of both kinds, figures worked out by hand; and the page in a real browser."""

import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import HOSTILE, Page, make_run

from jaxtune.cli import main
from jaxtune.errors import UserError
from jaxtune.report import write_report, write_sweep
from jaxtune.report.chart import Spread, spread_chart
from jaxtune.report.sweep_table import write_points

LR, SEED, RANK = "optim.lr", "train.seed", "tune.lora.r"
SHORT = {LR: "lr", SEED: "seed", RANK: "r"}


def lines_of(evals, train=(3.0, 2.0)):
    lines = [{"step": step + 1, "train/loss": loss} for step, loss in enumerate(train)]
    return lines + [{"step": step, "eval/loss": loss} for step, loss in evals.items()]


def overrides_of(point, **train):
    tree = {"model": {"path": "tiny/base"}, "data": {"train": "rows.jsonl"}, "train": {"steps": 40, **train}}
    for path, value in point.items():
        *sections, key = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return tree


class Sweep:
    """Writes a directory as `jaxtune sweep` does."""

    def __init__(self, folder):
        self.folder, self.points = folder, {}
        folder.mkdir(parents=True)

    def plan(self, point, name=None):
        name = name or ",".join(f"{SHORT[path]}={value!r}" for path, value in point.items())
        self.points[name] = point
        (self.folder / "sweep.json").write_text(json.dumps({"points": self.points, "halving": None, "rungs": []}))
        return self.folder / name

    def member(self, point, evals, status="finished", name=None, why=None, train=(3.0, 2.0), **facts):
        folder = self.plan(point, name)
        summary = {"trainable": 123, "seconds": {"train": 61.0}, "argv": ["jaxtune", "train", folder.name], **facts}
        summary |= {"point": point}
        make_run(folder, overrides_of(point), lines_of(evals, train), summary if status == "finished" else None)
        (folder / "member.json").write_text(json.dumps({"status": status} | ({"why": why} if why else {})))
        return folder


class SweepPage(Page):
    def charts(self):
        """{chart: {curve: [[x, value, ...], ...]}}, as the read-out has them."""
        titles = re.findall(r"<figcaption><b>(.*?)</b>", self.source)
        data = [json.loads(text) for kind, text in self.scripts if kind == "application/json"]
        return {t: {s["name"]: s["points"] for s in d["series"]} for t, d in zip(titles, data, strict=True)}

    def table(self, head="run"):
        """Rows under the heading, by column."""
        bounds = itertools.pairwise([*self.starts, len(self.rows)])
        heads, *rows = next(self.rows[a:b] for a, b in bounds if self.rows[a][0] == head)
        return [dict(zip(heads, row, strict=True)) for row in rows]


BY_RATE = "Held-out loss by learning rate"


@pytest.fixture
def sweep(tmp_path):
    """Three rates, two seeds; one diverged."""
    sweep = Sweep(tmp_path / "rates")
    losses = {(1e-4, 0): 2.0, (1e-4, 1): 2.2, (1e-3, 0): 1.0, (1e-3, 1): 1.5, (1e-2, 0): 1.1}
    for (lr, seed), loss in losses.items():
        sweep.member({LR: lr, SEED: seed}, {0: 3.5, 20: loss, 40: loss + 0.25})
    sweep.member({LR: 1e-2, SEED: 1}, {0: 4.0, 5: 3.5}, "failed", why="the loss is not finite at step 7")
    return sweep


def test_the_figures_are_those_of_the_members(sweep):
    assert write_sweep(sweep.folder) == sweep.folder / "report.html"
    page = SweepPage(sweep.folder / "report.html")
    assert (
        "6 points over optim.lr (1e-4, 0.001, 0.01) and train.seed (0, 1). "
        "lr=0.001,seed=0 has the lowest held-out loss, 1 at step 20. "
        "By the mean over 2 seeds, lr=0.001 is best: 1.25. Of them, 1 failed. " in page.text
    )
    table = page.table()
    assert [row["run"] for row in table] == [
        "lr=0.001,seed=0 best",
        "lr=0.01,seed=0",
        "lr=0.001,seed=1",
        "lr=0.0001,seed=0",
        "lr=0.0001,seed=1",
        "lr=0.01,seed=1",
    ]
    assert table[1] == {
        "run": "lr=0.01,seed=0",
        "status": "finished",
        "lr": "0.01",
        "seed": "0",
        "held-out loss": "1.1",
        "at step": "20",
        "training loss": "2",
        "trained": "123",
        "time": "1 min 01 s",
    }
    assert [table[-1][head] for head in ("status", "held-out loss", "trained", "time")] == ["failed", "3.5", "", ""]
    assert "failed the loss is not finite at step 7 lr=0.01,seed=1" in page.text
    assert page.row("optim.lr")[1] == "1e-4, 0.001, 0.01"
    assert page.row("train.seed")[1] == "0, 1"
    assert page.row("train.steps")[1] == "40", "shared, and no default"
    assert not any(row and row[0] == "train.batch_size" for row in page.rows), "a default"


def test_the_curves_are_those_of_the_members(sweep):
    charts = SweepPage(write_sweep(sweep.folder)).charts()
    assert list(charts) == [BY_RATE, "Held-out loss", "Training loss, smoothed"]
    assert charts["Held-out loss"]["lr=0.001,seed=1"] == [[0, 3.5], [20, 1.5], [40, 1.75]]
    assert set(charts["Training loss, smoothed"]) == set(sweep.points)
    assert charts[BY_RATE] == {
        "all": [
            [1e-4, 2.1, "2.1", "2 to 2.2 in 2 runs"],
            [1e-3, 1.25, "1.25", "1 to 1.5 in 2 runs"],
            [1e-2, 1.1, "1.1", "1 failed"],
        ]
    }


def test_the_rate_is_drawn_where_it_is(sweep):
    """1e-3 is half way from 1e-4 to 1e-2 on a log axis; the ticks say where the losses are."""
    source = write_sweep(sweep.folder).read_text()
    figure = source[source.index(f"<b>{BY_RATE}") :].partition("</figure>")[0]
    ticks = {float(v): float(top) for top, v in re.findall(r'class="ty" style="top:([\d.]+)%">([\d.]+)<', figure)}
    (low, bottom), (high, top) = min(ticks.items()), max(ticks.items())

    def at(value):
        return pytest.approx(10 * (bottom + (top - bottom) * (value - low) / (high - low)), abs=1)

    def path(kind):
        d = re.search(rf'class="{kind} c1" d="(.*?)"', figure)[1]
        return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", d)]

    assert path("ring") == [(500, at(1.0))]
    assert path("line") == [(0, at(2.1)), (500, at(1.25)), (1000, at(1.1))]
    assert path("band") == [(0, at(2)), (500, at(1)), (1000, at(1.1)), (1000, at(1.1)), (500, at(1.5)), (0, at(2.2))]
    assert len(path("dot")) == 5
    assert re.findall(r'class="lost" style="left:([\d.]+)%"', figure) == ["100.00"]
    assert re.findall(r'class="tx" style="left:([\d.]+)%">(.*?)<', figure) == [
        *(("0.00", "1e-4"), ("50.00", "0.001"), ("100.00", "0.01"))
    ]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({1e-4: 1.0, 1e-3: 2.0}, "The best learning rate, 1e-4, is the lowest that was tried: try rates below it too."),
        ({1e-4: 2.0, 1e-3: 1.0}, "The best learning rate, 0.001, is the highest that was tried"),
        ({1e-4: 2.0, 1e-3: 1.0, 1e-2: 1.5}, None),
        ({1e-4: 2.0, 1e-3: 1.0, 1e-2: None}, None),  # one that failed is an end, too
        ({1e-4: None, 1e-3: None}, None),
        ({1e-3: 1.0}, None),
    ],
)
def test_a_best_rate_at_the_edge_is_told(tmp_path, losses, said):
    sweep = Sweep(tmp_path / "s")
    for lr, loss in losses.items():
        sweep.member({LR: lr}, {} if loss is None else {10: loss}, "failed" if loss is None else "finished")
    text = SweepPage(write_sweep(sweep.folder)).text
    assert said in text if said else "that was tried" not in text


def test_the_edge_is_that_of_the_mean_over_seeds(tmp_path):
    """One lucky seed at the highest rate; the mean is best in the middle."""
    sweep = Sweep(tmp_path / "s")
    for lr, losses in {1e-4: (3.0, 3.0), 1e-3: (2.0, 2.0), 1e-2: (1.9, 2.9)}.items():
        for seed, loss in enumerate(losses):
            sweep.member({LR: lr, SEED: seed}, {10: loss})
    text = SweepPage(write_sweep(sweep.folder)).text
    assert "lr=0.01,seed=0 has the lowest held-out loss, 1.9 at step 10. By the mean over 2 seeds, lr=0.001 is" in text
    assert "that was tried" not in text


def test_a_line_for_each_value_of_another_setting(tmp_path):
    sweep = Sweep(tmp_path / "s")
    for (i, lr), (j, rank) in itertools.product(enumerate((1e-4, 3e-4, 1e-3)), enumerate((4, 8))):
        sweep.member({LR: lr, RANK: rank}, {10: 1 + i + j / 2})
    page = SweepPage(write_sweep(sweep.folder))
    assert page.charts()[BY_RATE] == {
        "r=4": [[1e-4, 1, "1", ""], [3e-4, 2, "2", ""], [1e-3, 3, "3", ""]],
        "r=8": [[1e-4, 1.5, "1.5", ""], [3e-4, 2.5, "2.5", ""], [1e-3, 3.5, "3.5", ""]],
    }
    assert 'class="band' not in page.source, "nothing is repeated"
    assert "By the mean" not in page.text and "bands" not in page.text


def test_the_best_eight_lines_and_runs_have_a_colour(tmp_path):
    sweep = Sweep(tmp_path / "s")
    for rank, lr in itertools.product(range(1, 11), (1e-4, 1e-3)):
        sweep.member({LR: lr, RANK: rank}, {10: rank + lr})
    page = SweepPage(write_sweep(sweep.folder))
    data = [json.loads(text) for kind, text in page.scripts if kind == "application/json"]
    rates, runs, _ = ({s["name"]: s["colour"] for s in d["series"]} for d in data)
    assert rates == {f"r={rank}": rank if rank <= 8 else 0 for rank in range(1, 11)}
    assert sorted(runs.values()) == [0] * 12 + list(range(1, 9))
    assert {name for name, colour in runs.items() if colour} == {
        f"lr={lr},r={r}" for lr in (0.0001, 0.001) for r in (1, 2, 3, 4)
    }
    assert "12 others" in page.text


def test_what_has_not_come_to_its_end_is_listed(tmp_path):
    sweep = Sweep(tmp_path / "s")
    sweep.member({LR: 1e-3}, {20: 1.5, 40: 1.0})
    sweep.member({LR: 2e-3}, {10: 2.0}, cut_at=10)
    sweep.member({LR: 3e-3}, {10: 2.5}, cut_at=10, early_stop=True)
    sweep.member({LR: 4e-3}, {10: 2.75}, "running", train=[3.0] * 12)
    sweep.member({LR: 5e-3}, {}, "failed", train=[9.0], why="the loss is not finite at step 2")
    sweep.plan({LR: 6e-3})  # no directory
    sweep.plan({LR: 7e-3}).mkdir()
    empty = sweep.member({LR: 8e-3}, {}, "running")
    (empty / "metrics.jsonl").write_text("")
    torn = sweep.member({LR: 9e-3}, {}, "running")
    (torn / "metrics.jsonl").write_text('{"step": 1, "tr')
    page = SweepPage(write_sweep(sweep.folder))
    assert [(row["lr"], row["status"]) for row in page.table()] == [
        ("0.001", "finished"),
        ("0.002", "cut"),
        ("0.003", "finished"),
        ("0.004", "unfinished"),
        ("0.006", "not started"),
        ("0.007", "not started"),
        ("0.008", "unfinished"),
        ("0.009", "unfinished"),
        ("0.005", "failed"),
    ]
    assert "lr=0.001 has the lowest held-out loss so far, 1 at step 40." in page.text
    assert "Of them, 1 failed, 1 was cut by halving, 3 have not finished and 2 have not begun." in page.text
    for line in (
        "cut halving ended it at step 10 lr=0.002",
        "failed the loss is not finite at step 2 lr=0.005",
        "not started lr=0.006; lr=0.007",
        "unfinished at step 12 of 40 lr=0.004",
    ):
        assert line in page.text
    assert page.charts()[BY_RATE]["all"] == [
        *([1e-3, 1.0, "1", ""], [2e-3, 2.0, "2", ""], [3e-3, 2.5, "2.5", ""], [4e-3, 2.75, "2.75", ""]),
        [5e-3, pytest.approx(3.0), "failed", ""],  # the top of the axis
    ]


def test_a_failed_point_never_wins(tmp_path):
    sweep = Sweep(tmp_path / "s")
    sweep.member({LR: 1e-3}, {10: 2.0})
    sweep.member({LR: 2e-3}, {10: 1.0}, "failed", why="not finite")
    page = SweepPage(write_sweep(sweep.folder))
    assert "lr=0.001 has the lowest held-out loss, 2 at step 10." in page.text
    assert "The best again: lr=0.001" in page.text


def test_a_sweep_of_which_all_failed(tmp_path):
    sweep = Sweep(tmp_path / "s")
    for lr in (1.0, 2.0):
        sweep.member({LR: lr}, {}, "failed", why="not finite", train=[float("nan")])
    page = SweepPage(write_sweep(sweep.folder))
    assert "None has a result. Of them, 2 failed." in page.text
    assert "The best again" not in page.text
    assert page.charts() == {}


def test_without_held_out_data_the_training_loss_decides(tmp_path):
    sweep = Sweep(tmp_path / "s")
    for lr, loss in {1e-4: 1.5, 1e-3: 1.0, 1e-2: 1.25}.items():
        sweep.member({LR: lr}, {}, train=[3.0, loss])
    page = SweepPage(write_sweep(sweep.folder))
    assert "lr=0.001 has the lowest training loss, 1. There is no held-out loss to judge by." in page.text
    assert page.charts()["Training loss by learning rate"]["all"][1][:2] == [1e-3, 1.0]
    assert "held-out loss" not in page.table()[0]


def test_other_settings_alone(tmp_path):
    sweep = Sweep(tmp_path / "s")
    for rank, loss in {4: 1.5, 8: 1.0}.items():
        sweep.member({RANK: rank}, {10: loss})
    page = SweepPage(write_sweep(sweep.folder))
    assert "2 points over tune.lora.r (4, 8). r=8 has the lowest" in page.text
    assert list(page.charts()) == ["Held-out loss", "Training loss, smoothed"]


def test_many_values_are_told_as_a_range(tmp_path):
    sweep = Sweep(tmp_path / "s")
    for i in range(6):
        sweep.member({SEED: i}, {10: 1.0})
    assert "6 points over train.seed (6 values from 0 to 5)." in SweepPage(write_sweep(sweep.folder)).text


def test_a_sweep_of_the_shell_script(tmp_path):
    folder = tmp_path / "rates"
    for rate, loss in (("1e-4", 2.0), ("1e-3", 1.5), ("2e-3", 1.25)):
        argv = ["jaxtune", "train", "--config=c.py", f"--config.optim.lr={rate}"]
        summary = {"trainable": 5, "argv": argv}
        run = make_run(folder / f"lr={rate}", overrides_of({LR: float(rate)}), lines_of({10: loss}), summary)
        (run / "exit_status").write_text("0\n")
    write_report(run)
    (folder / "lr=1e-2").mkdir()
    (folder / "lr=1e-2" / "exit_status").write_text("1\n")
    (folder / "lr=1e-2" / "jaxtune.log").write_text("line\njaxtune: error: no room\n\n")
    (folder / "lr=1e-1").mkdir()
    (folder / "lr=fast").mkdir()
    with pytest.raises(UserError, match=r"no sweep\.json.*python -m jaxtune\.report\.sweep_table"):
        write_sweep(folder)
    write_points(folder)
    page = SweepPage(write_sweep(folder))
    assert (
        "5 points over optim.lr (5 values from 1e-4 to 0.1). lr=2e-3 has the lowest held-out loss so far" in page.text
    )
    assert [(row["run"], row["status"]) for row in page.table()] == [
        ("lr=2e-3 best", "finished"),
        ("lr=1e-3", "finished"),
        ("lr=1e-4", "finished"),
        ("lr=1e-1", "not started"),
        ("lr=1e-2", "failed"),
    ]
    assert "failed exit status 1: jaxtune: error: no room lr=1e-2" in page.text
    assert page.charts()[BY_RATE]["all"][:3] == [[1e-4, 2, "2", ""], [1e-3, 1.5, "1.5", ""], [2e-3, 1.25, "1.25", ""]]
    assert page.links() == ["lr%3D2e-3/report.html"]
    assert "as it was started" in page.text
    assert "jaxtune train --config=c.py --config.optim.lr=2e-3" in page.text


def test_what_the_runs_of_the_script_differ_in_besides(tmp_path):
    for rate, steps in (("1e-4", 40), ("1e-3", 80)):
        overrides = overrides_of({LR: float(rate)}, steps=steps)
        make_run(tmp_path / "s" / f"lr={rate}", overrides, lines_of({10: 1.0}))
    write_points(tmp_path / "s")
    page = SweepPage(write_sweep(tmp_path / "s"))
    assert "2 points over optim.lr (1e-4, 0.001) and train.steps (40, 80)." in page.text
    assert [row["steps"] for row in page.table()] == ["40", "80"]


def test_the_command_of_the_winner(sweep):
    source = write_sweep(sweep.folder).read_text()
    section = source[source.index("The best again: lr=0.001,seed=0") :]
    assert re.findall(r"<h3>(.*?)</h3>\s*<div class=\"snippet\"><pre>(.*?)</pre>", section) == [
        ("alone, outside the sweep", "jaxtune train lr=0.001,seed=0"),
        (
            "with every setting of this run",
            f"jaxtune train --config={sweep.folder}/lr=0.001,seed=0/config.json "
            f"--workdir={sweep.folder}/lr=0.001,seed=0-again",
        ),
    ]


def test_nothing_in_a_sweep_is_markup(tmp_path):
    sweep = Sweep(tmp_path / "<script>alert(9)<")
    bad = "lr=<script>alert(1)<\"'&"
    winner = sweep.member({LR: 1e-3}, {10: 1.0}, name=bad, argv=["jaxtune", HOSTILE])
    write_report(winner)
    sweep.member({LR: 2e-3}, {10: 2.0}, "failed", why=HOSTILE)
    sweep.member({LR: 3e-3, "data.train": "<img src=x onerror=alert(3)>"}, {10: 2.0}, HOSTILE, name="c")
    page = SweepPage(write_sweep(sweep.folder))
    assert "<script>alert" not in page.source and "<img" not in page.source
    assert bad in page.charts()["Held-out loss"] and f"{bad} best" in [row["run"] for row in page.table()]
    assert page.links() == [
        "lr%3D%3Cscript%3Ealert%281%29%3C%22%27%26/report.html",
    ]
    assert not {"onerror", "onload", "src"} & {name for _, attributes in page.tags for name in attributes}
    assert sum(tag == "script" for tag, _ in page.tags) == 1 + len(page.charts())


def test_the_page_stands_alone(sweep):
    page = SweepPage(write_sweep(sweep.folder))
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", page.source)
    assert not {"src", "srcset", "action", "onclick"} & {name for _, attributes in page.tags for name in attributes}
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_it_needs_no_jax(sweep):
    code = (
        "import sys; from jaxtune.report import write_sweep; write_sweep(sys.argv[1]);"
        "assert not {'jax', 'numpy', 'transformers', 'ml_collections', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(sweep.folder)], check=True, cwd=Path(__file__).parent.parent)


# ------------------------------------------------------------------------------------------------ the command, errors


def test_the_command(sweep, tmp_path, capsys):
    run = sweep.folder / "lr=0.01,seed=0"
    assert main(["report", str(sweep.folder)]) == 0
    assert main(["report", str(sweep.folder), f"--out={tmp_path / 'page.html'}"]) == 0
    assert main(["report", str(run)]) == 0
    pages = [sweep.folder / "report.html", tmp_path / "page.html", run / "report.html"]
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(".html")] == list(map(str, pages))
    titles = [re.search(r"<h1>(.*?)</h1>", page.read_text())[1] for page in pages]
    assert titles == ["rates", "rates", "lr=0.01,seed=0"]
    write_sweep(sweep.folder, tmp_path / "page.html")
    assert SweepPage(tmp_path / "page.html").links() == ["rates/lr%3D0.01%2Cseed%3D0/report.html"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_with_a_folder_that_looks_like_a_rate_is_a_run(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (run / "lr=1e-3").mkdir()
    assert main(["report", str(run)]) == 0
    assert "<h1>run</h1>" in (run / "report.html").read_text()
    with pytest.raises(UserError, match=r"is not the directory of a sweep: it has no sweep\.json"):
        write_sweep(run)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("{", r"sweep\.json: not valid JSON"),
        (b"\xff", r"sweep\.json is not a text file"),
        ("[1]", r"sweep\.json holds a list, expected a JSON object"),
        ("{}", r"sweep\.json: expected the points of a sweep under 'points'"),
        ('{"points": {}}', "expected the points"),
        ('{"points": ["a"]}', "expected the points"),
        ('{"points": {"../other": {"optim.lr": 1}}}', r"'\.\./other' does not name a directory beside it"),
        ('{"points": {"..": {"optim.lr": 1}}}', r"'\.\.' does not name a directory"),
        ('{"points": {"": {"optim.lr": 1}}}', "'' does not name a directory"),
        ('{"points": {"a": [1]}}', r"the point 'a' is no object of settings: \[1\]"),
        ('{"points": {"a": {"optim.rl": 1}}}', r"the point 'a': there is no setting optim\.rl"),
        ('{"points": {"a": {"optim.lr": 1}}}', "none of its 1 runs has logged a step yet"),
    ],
)
def test_a_plan_that_is_wrong(tmp_path, plan, said):
    (tmp_path / "sweep.json").write_bytes(plan if isinstance(plan, bytes) else plan.encode())
    with pytest.raises(UserError, match=said):
        write_sweep(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("member.json", "{", r"member\.json: not valid JSON"),
        ("member.json", "{}", r"member\.json: expected a 'status'"),
        ("member.json", '{"status": 3}', r"member\.json: expected a 'status'"),
        ("summary.json", "[]", r"summary\.json: expected an object"),
        ("config.json", "{", r"config\.json"),
    ],
)
def test_a_broken_file_of_a_member_is_named(sweep, file, text, said):
    (sweep.folder / "lr=0.001,seed=0" / file).write_text(text)
    with pytest.raises(UserError, match=said):
        write_sweep(sweep.folder)


def test_what_is_no_sweep(tmp_path, capsys):
    with pytest.raises(UserError, match="no such directory"):
        write_sweep(tmp_path / "nowhere")
    for name in ("lr=fast", "lr=-1", "lr=0", "lr=nan", "lr=inf"):
        (tmp_path / name).mkdir()
    (tmp_path / "lr=1e-3").write_text("no directory")
    with pytest.raises(UserError, match="is not the directory of a sweep"):
        write_sweep(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- whatever is swept

LOSSES = st.floats(1e-3, 1e3)
POINTS = st.dictionaries(
    st.tuples(st.sampled_from([1e-5, 3e-4, 0.5]), st.integers(0, 3)),
    st.tuples(st.sampled_from(["finished", "running", "failed", "absent"]), st.lists(LOSSES, max_size=3)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(POINTS)
def test_every_point_is_listed_once_and_the_best_leads(points):
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(Path(folder) / "s")
        for (lr, seed), (status, losses) in points.items():
            point = {LR: lr, SEED: seed}
            if status == "absent":
                sweep.plan(point)
            else:
                sweep.member(point, dict(enumerate(losses, 1)), status)
        if all(status == "absent" for status, _ in points.values()):
            with pytest.raises(UserError, match="logged"):
                write_sweep(sweep.folder)
            return
        page = SweepPage(write_sweep(sweep.folder))
    table = page.table()
    assert sorted(row["run"].removesuffix(" best") for row in table) == sorted(sweep.points)
    best = {
        f"lr={lr!r},seed={seed}": min(losses)
        for (lr, seed), (status, losses) in points.items()
        if losses and status in ("finished", "running")
    }
    shown = [row["run"].removesuffix(" best") for row in table]
    assert [best[name] for name in shown if name in best] == sorted(best.values())
    if best:
        assert set(shown[: len(best)]) == set(best)
        assert table[0]["run"].endswith(" best")
        assert sum(row["run"].endswith(" best") for row in table) == 1
    statuses = {"finished": "finished", "running": "unfinished", "failed": "failed", "absent": "not started"}
    told = {row["run"].removesuffix(" best"): row["status"] for row in table}
    assert told == {f"lr={lr!r},seed={s}": statuses[status] for (lr, s), (status, _) in points.items()}


RATES = st.floats(1e-12, 1e3)


@given(
    st.dictionaries(RATES, st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4), min_size=1, max_size=9),
    st.dictionaries(RATES, st.integers(1, 3), max_size=3),
)
def test_all_of_a_spread_is_drawn_inside_its_chart(values, lost):
    chart = spread_chart("t", "rate", [Spread("s", values, lost)])
    drawn = next(shape.d for shape in chart.shapes if shape.kind == "dot c1")
    dots = [tuple(map(float, xy.split())) for xy in re.findall(r"M(\S+ [^h]+)h0", drawn)]
    assert len(dots) == sum(map(len, values.values()))
    assert all(0 <= x <= 1000 and -0.05 <= y <= 1000.05 for x, y in dots)
    assert [x for x, _ in dots] == sorted(x for x, _ in dots)
    assert len(chart.lost) == len(lost) and all(0 <= left <= 100 for left, _ in chart.lost)
    said = chart.readout["series"][0]["points"]
    assert [at for at, *_ in said] == sorted({*values, *lost})
    for at, mean, *_ in said:
        if at in values:
            assert mean == pytest.approx(math.fsum(values[at]) / len(values[at]), rel=1e-4, abs=1e-6)


# -------------------------------------------------------------------------------------------------------- in a browser


def test_sorting_filtering_and_the_read_out(sweep, browser):
    sweep.plan({LR: 0.1, SEED: 0})
    page = write_sweep(sweep.folder)
    browser.open(page)

    def column(name):
        """What is seen of a column."""
        heads = browser.driver.find_elements("css selector", "table.filterable th button")
        i = 1 + [head.text for head in heads].index(name)
        cells = browser.driver.find_elements("css selector", f"table.filterable tbody tr > :nth-child({i})")
        return heads[i - 1], [cell.text for cell in cells if cell.is_displayed()]

    assert column("held-out loss")[1] == ["1", "1.1", "1.5", "2", "2.2", "", "3.5"], "as they were ranked"
    column("held-out loss")[0].click()
    assert column("held-out loss")[1] == ["1", "1.1", "1.5", "2", "2.2", "3.5", ""], "empty cells last"
    column("held-out loss")[0].click()
    assert column("held-out loss")[1] == ["3.5", "2.2", "2", "1.5", "1.1", "1", ""]
    column("lr")[0].click()
    assert column("lr")[1] == ["1e-4", "1e-4", "0.001", "0.001", "0.01", "0.01", "0.1"], "by value"

    def typed(text):
        field = browser.find(".filter input")
        field.clear()
        browser.press(field, text)
        names = [name.split()[0] for name in column("run")[1]]
        assert browser.find(".filter output").text == f"{len(names)} of 7"
        return set(names)

    assert typed("lr=1e-4") == {"lr=0.0001,seed=0", "lr=0.0001,seed=1"}
    assert typed("lr=1e-3") == typed("lr=0.001") == {"lr=0.001,seed=0", "lr=0.001,seed=1"}
    assert typed("lr=0.01 seed=1") == {"lr=0.01,seed=1"}
    assert typed("FAILED") == typed("status=fail") == {"lr=0.01,seed=1"}
    assert typed("not started") == {"lr=0.1,seed=0"}
    assert typed("seed=1 failed finished") == set()
    assert typed("lr=0.0001,seed=1") == {"lr=0.0001,seed=1"}
    assert typed("best") == {"lr=0.001,seed=0"}
    assert len(typed(" ")) == 7

    plot, tip = browser.find("#learning-rate .plot"), browser.find("#learning-rate .tip")
    browser.hover(plot)
    said = " ".join(tip.text.split())
    assert said == "learning rate 0.001 all 1.25 1 to 1.5 in 2 runs", "half way on a log axis"
    assert browser.js("parseFloat(document.querySelector('#learning-rate .cursor').style.left)") == pytest.approx(50)
    right = "arguments[0].getBoundingClientRect().right"
    inside = f"return [...arguments[0].querySelectorAll('*')].every(e => e.getBoundingClientRect().right <= {right})"
    assert browser.js_on(tip, inside), "nothing sticks out of the read-out"
    browser.press(plot, "HOME")
    assert " ".join(tip.text.split()) == "learning rate 1e-4 all 2.1 2 to 2.2 in 2 runs"
    assert browser.requests() - {"data:,"} == {page.as_uri()}
    assert browser.errors() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_every_word_can_be_read(sweep, browser, width, dark):
    browser.open(write_sweep(sweep.folder), width, dark=dark)
    browser.js_on(browser.find("details"), "arguments[0].open = true")
    assert browser.overflow() <= 0
    assert browser.contrast() > (4.5, "")
    assert browser.errors() == []
