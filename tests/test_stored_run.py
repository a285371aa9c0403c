"""A run directory that version 0.1.0 wrote, stopped after 8 of 12 steps, goes on as that version would have."""

import json
import shutil
from pathlib import Path

import pytest

from jaxtune.cli import main

STORED = Path(__file__).parent / "stored"


def losses(file):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in ("train/loss", "eval/loss") if name in line}


def test_it_goes_on(tmp_path, monkeypatch, capsys):
    shutil.copytree(STORED, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    before = json.loads(Path("run/config.json").read_text())
    assert before["model"]["unroll"] == 1 and before["log"]["plot"] is True  # settings that are gone
    assert main(["train", "--config=run/config.json", "--config.train.steps=12", "--workdir=run"]) == 0
    assert "Resuming after step 8 of 12" in capsys.readouterr().out
    assert losses(Path("run/metrics.jsonl")) == pytest.approx(losses(Path("whole.jsonl")), rel=1e-4)


@pytest.mark.parametrize("flag, successor", [("model.unroll=2", "it was removed"), ("log.plot=true", "log.progress")])
def test_settings_that_are_gone_are_refused_with_what_took_their_place(flag, successor, tmp_path, capsys):
    given = ["--config.model.path=m", "--config.data.train=a.jsonl", f"--config.{flag}"]
    assert main(["train", *given, f"--workdir={tmp_path / 'run'}"]) == 2
    assert successor in capsys.readouterr().err
