"""`jaxtune data` from the command line: exit status, the report as JSON, the clean set."""

import json

import pytest
from data_zoo import write_jsonl

from jaxtune import tiny
from jaxtune.cli import main

ROWS = [json.loads(line) for line in tiny.TRAIN.read_text().splitlines()[:40]]


def run(tmp_path, *flags, train="rows.jsonl"):
    names = [f"--config.model.path={tiny.BASE}", f"--config.data.train={tmp_path / train}"]
    return main(["data", *names, *flags])


@pytest.fixture
def rows(tmp_path):
    extra = [{"prompt": "Message: hello\nJSON:\n", "completion": " "}, {"prompt": 3, "completion": None}]
    write_jsonl(tmp_path / "rows.jsonl", [dict(row, id=i) for i, row in enumerate([*ROWS, ROWS[4], *extra])])
    return tmp_path


def test_report_on_a_terminal_and_as_json(rows, capsys):
    assert run(rows, f"--workdir={rows / 'run'}") == 0
    out = capsys.readouterr().out
    assert "duplicates" in out and "rows.jsonl:41 =" in out.replace("\n", "")
    report = json.loads((rows / "run" / "data_report.json").read_text())
    assert {f["check"] for f in report["findings"]} == {"duplicates", "empty_answers", "unreadable", "not_used"}
    assert report["findings"][0]["severity"] == "error"
    assert report["summary"]["rows"] == 42 and len(report["samples"]) == 3
    assert "".join(p["text"] for p in report["samples"][0]["pieces"] if p["trained"]).startswith("{")


def test_strict_fails_on_warnings(rows, capsys):
    assert run(rows, "--strict") == 2
    assert "--strict: the data has 1 errors and 2 warnings" in capsys.readouterr().err
    write_jsonl(rows / "good.jsonl", ROWS)
    assert run(rows, "--strict", train="good.jsonl") == 0


def test_the_clean_set_has_no_findings_and_its_log_has_the_rest(rows, capsys):
    out = rows / "clean.jsonl"
    assert run(rows, f"--write-clean={out}") == 0
    clean, source = ([json.loads(line) for line in p.read_text().splitlines()] for p in (out, rows / "rows.jsonl"))
    log = [json.loads(line) for line in (rows / "clean.removed.jsonl").read_text().splitlines()]
    assert clean == source[:40]
    assert [entry["content"] for entry in log] == source[40:]
    assert [entry["check"] for entry in log] == ["duplicates", "empty_answers", "unreadable"]
    assert log[0]["row"].endswith("rows.jsonl:41") and log[0]["because"].endswith("rows.jsonl:5")
    capsys.readouterr()
    assert run(rows, "--strict", train="clean.jsonl") == 0
    assert run(rows, f"--write-clean={out}") == 2
    assert "exists and is not overwritten" in capsys.readouterr().err


def test_rows_that_differ_in_tools_or_system_alone_are_no_duplicates(tmp_path, capsys):
    """Whichever columns the first row has."""

    def chat(n, **more):
        turns = [
            {"role": "user", "content": f"which mugs are {n} of"},
            {"role": "assistant", "content": "the red mugs"},
        ]
        return {"messages": turns, **more}

    tools = [[{"type": "function", "function": {"name": n, "description": "d", "parameters": {}}}] for n in "vw"]
    rows = [chat(0), *(chat(1, tools=t) for t in tools), *(chat(2, system=s) for s in ("be brief", "be kind"))]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, *rows])
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert run(tmp_path, f"--write-clean={tmp_path / 'clean.jsonl'}", f"--config.model.chat_template={template}") == 0
    clean = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    assert clean == rows
    log = [json.loads(line) for line in (tmp_path / "clean.removed.jsonl").read_text().splitlines()]
    assert [(entry["check"], entry["because"][-1]) for entry in log] == [("duplicates", str(i)) for i in range(1, 6)]


def test_near_duplicates_stay_unless_it_is_asked_for(tmp_path, capsys):
    words = " ".join(f"word{i}" for i in range(25))
    rows = [{"prompt": f"the {n} mug {words}", "completion": "yes"} for n in ("red", "blue")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    more = "--config.data.max_length=512"
    for out, kept, *flag in (("a.jsonl", 2), ("b.jsonl", 1, "--drop-near")):
        assert run(tmp_path, f"--write-clean={tmp_path / out}", *flag, "--near=0.7", more) == 0
        assert len((tmp_path / out).read_text().splitlines()) == kept
    assert "near_duplicates" in capsys.readouterr().out
    assert run(tmp_path, "--drop-near") == 2
    assert "no effect without --write-clean" in capsys.readouterr().err


def test_a_file_a_source(rows):
    write_jsonl(rows / "more.jsonl", [{"prompt": "Message: a mug\nJSON:\n", "completion": "{}"}])
    two = f"rows.jsonl,{rows / 'more.jsonl'}"
    assert run(rows, f"--write-clean={rows / 'clean.jsonl'}", train=two) == 0
    assert len((rows / "clean-1.jsonl").read_text().splitlines()) == 40
    assert (rows / "clean-2.jsonl").read_text() == (rows / "more.jsonl").read_text()


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--write-clean=out.csv", "expected a .jsonl file"),
        ("--near=1.5", "expected a similarity from 0 to 1"),
        ("--rows=-1", "expected 0 or more"),
        ("--config.data.columns=prompt=nothing,completion=completion", "columns"),
    ],
)
def test_wrong_input(rows, capsys, flag, said):
    assert run(rows, flag) == 2
    assert said in capsys.readouterr().err


def test_nothing_left_to_write(tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a b c", "completion": ""}] * 2)
    assert run(tmp_path, f"--write-clean={tmp_path / 'clean.jsonl'}") == 2
    assert "no row would be left" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


def test_help_says_what_strict_does(capsys):
    assert main(["data", "--help"]) == 0
    assert "with --strict, a finding is an error or a warning" in capsys.readouterr().out


def test_labelled_texts(tmp_path, capsys):
    rows = [
        {"review": f"the {i} mugs were {'good' if i % 3 else 'bad'}", "mood": "up" if i % 3 else "down"}
        for i in range(30)
    ]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[7], {"review": "the 4 mugs were good", "mood": "down"}])
    write_jsonl(tmp_path / "eval.jsonl", [rows[2], {"review": "all mugs are gone", "mood": "down"}])
    flags = ["--config.objective.name=sequence_classification", "--config.data.columns=text=review,label=mood"]
    flags += [f"--config.data.train={tmp_path / 'rows.jsonl'}", f"--config.data.eval={tmp_path / 'eval.jsonl'}"]
    flags += [
        f"--config.model.path={tiny.BASE}",
        f"--workdir={tmp_path / 'run'}",
        f"--write-clean={tmp_path / 'clean.jsonl'}",
    ]
    assert main(["data", *flags, "--near=0"]) == 0
    assert "⟦up⟧" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    found = {f["check"]: f for f in report["findings"]}
    assert set(found) == {"overlap", "duplicates", "conflicts"}
    assert [row.rpartition("/")[2] for row in found["duplicates"]["rows"]] == ["rows.jsonl:8"]
    assert found["conflicts"]["count"] == 1 and found["overlap"]["severity"] == "error"
    assert report["summary"]["groups"]["answer"] == [{"value": "up", "rows": 21}, {"value": "down", "rows": 11}]
    kept = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    assert kept == [*rows[:2], *rows[3:], {"review": "the 4 mugs were good", "mood": "down"}]


def test_tagged_words(tmp_path, capsys):
    lines = []
    for i in range(24):
        lines += [f"mug{i} O", "of O", f"Ada{i} B-person", "Low I-person", ""]
    lines += ["same O", "mug O", "", "same O", "mug B-person", ""]
    (tmp_path / "rows.conll").write_text("\n".join(lines))
    flags = ["--config.objective.name=token_classification", f"--config.data.train={tmp_path / 'rows.conll'}"]
    flags += [f"--config.model.path={tiny.BASE}", f"--workdir={tmp_path / 'run'}"]
    assert main(["data", *flags, "--rows=1"]) == 0
    assert "person" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert {f["check"] for f in report["findings"]} == {"conflicts"}
    assert report["summary"]["groups"]["answer"] == [
        {"value": "B-person", "rows": 25},
        {"value": "I-person", "rows": 24},
    ]
    assert report["summary"]["rows"] == 26
