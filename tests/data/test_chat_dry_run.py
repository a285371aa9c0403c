"""`jaxtune train --dry-run` over conversations: what it says, and its exit status. Runs that go on on another day."""

import datetime
import json

import pytest
import runs
from data_zoo import CHATML, byte_tokenizer, write_jsonl

from jaxtune.cli import main
from jaxtune.commands.sweep import FLAGS
from jaxtune.commands.train import Clock
from jaxtune.flags import parse
from jaxtune.run.grid import Sweep

USER = {"role": "user", "content": "2+2?"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that stops at </s>, with a template whose turns end with <|im_end|>."""
    folder = runs.write_model(tmp_path_factory.mktemp("model"), vocab_size=260)
    byte_tokenizer(CHATML).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("row", "flags", "status", "said"),
    [
        (
            {"messages": [USER, {"role": "assistant", "content": "4", "weight": 1, "mood": "sure"}], "source": "x"},
            [],
            0,
            [
                "columns that are not used: source (8)",
                "fields of messages that are not used: mood (8)",
                "Trained turns end with <|im_end|> (259), and the model stops at </s> (257)",
                "⟦4<|im_end|>⟧",
            ],
        ),
        ({"prompt": "a", "completion": "b", "label": False}, [], 2, ["d.jsonl:1: answers judged good or bad"]),
        (
            {"messages": [USER, {"role": "assistant", "content": "4", "thinking": "two twos"}]},
            [],
            2,
            ["leaves out its thoughts (two twos)", "data.allow_left_out=thoughts"],
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "4", "thinking": "two twos"}]},
            [
                "--config.data.allow_left_out=thoughts",
                "--config.data.roles=customer=user",
                "--config.data.ignore=id,time",
            ],
            0,
            ["left out by the chat template: thoughts (8)", "⟦4<|im_end|>⟧"],
        ),
    ],
)
def test_dry_run(model, tmp_path, capsys, row, flags, status, said):
    path = write_jsonl(tmp_path / "d.jsonl", [row] * 8)
    words = {"model.path": model, "data.train": path, "data.max_length": 64, "data.cache": "false"}
    given = [f"--config.{name}={value}" for name, value in words.items()]
    assert main(["train", *given, *flags, "--dry-run"]) == status
    out = "".join(capsys.readouterr())
    assert all(text in out for text in said), json.dumps(out)


DATED = "<|im_start|>system\nToday: {{ strftime_now('%Y-%m-%d') }}<|im_end|>\n" + CHATML


@pytest.fixture
def today(monkeypatch):
    """Sets what day it is."""

    def on(*date):
        class Day(datetime.date):
            @classmethod
            def today(cls):
                return cls(*date)

        monkeypatch.setattr(datetime, "date", Day)

    return on


@pytest.fixture
def dated(tmp_path, tmp_path_factory):
    """The flags of a model whose template writes the day."""
    folder = runs.write_model(tmp_path_factory.mktemp("dated"), vocab_size=260)
    byte_tokenizer(DATED, eos="<|im_end|>").save_pretrained(folder)
    rows = [{"messages": [USER, {"role": "assistant", "content": str(i)}]} for i in range(8)]
    words = {"model.path": folder, "data.train": write_jsonl(tmp_path / "d.jsonl", rows), "data.max_length": 64}
    words |= {"data.cache": "false", "tune.lora.r": 2, "train.batch_size": 4}
    return [f"--config.{name}={value}" for name, value in words.items()]


def test_a_run_goes_on_with_the_date_it_began_with(dated, today, tmp_path, capsys):
    flags = [*dated, "--config.log.progress=false", "--config.log.tensorboard=false", f"--workdir={tmp_path / 'run'}"]
    today(2024, 2, 28)
    assert main(["train", *flags, "--config.train.steps=2"]) == 0
    today(2024, 3, 1)
    assert main(["train", *flags, "--config.train.steps=3"]) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["data"]["date"], stored["train"]["steps"]) == ("2024-02-28", 3)
    capsys.readouterr()
    assert main(["train", *flags, "--config.train.steps=3", "--config.data.date=2024-03-01"]) == 2
    assert "data.date" in capsys.readouterr().err


def test_a_sweep_goes_on_with_the_date_it_began_with(dated, today, tmp_path):
    def begun(rates, workdir=tmp_path / "sweep"):
        argv = [*dated, "--config.train.steps=2", f"--workdir={workdir}"]
        options = parse(argv, FLAGS, required=(), sweeps=True)[1]
        workdir.mkdir(exist_ok=True)
        sweep = Sweep(folder=workdir, resolve=options.resolve, argv=argv, clock=Clock(0.0), group_size=2)
        sweep.add(sweep.check([{"optim.lr": rate} for rate in rates]))
        found = {name: (p.cfg.data.date, sweep.open(p)[1].report.fingerprint) for name, p in sweep.points.items()}
        return found, sweep._place(next(iter(found))).argv

    today(2024, 2, 28)
    before, argv = begun([0.001, 0.01])
    assert {date for date, _ in before.values()} == {"2024-02-28"} and "--config.data.date=2024-02-28" in argv
    today(2024, 3, 1)
    after, _ = begun([0.001, 0.01, 0.1])
    assert len(after) == 3 and set(after.values()) == set(before.values())
    other, _ = begun([0.001], tmp_path / "other")
    assert set(other.values()) != set(before.values())
