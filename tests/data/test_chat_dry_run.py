"""`jaxtune train --dry-run` over conversations: what it says, and its exit status."""

import json

import pytest
import runs
from data_zoo import CHATML, byte_tokenizer, write_jsonl

from jaxtune.cli import main

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
