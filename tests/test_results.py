"""What a run leaves behind, read with other libraries' eyes."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtune import cli, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the head of the packaged model, computed in bfloat16."""
    workdir = tmp_path_factory.mktemp("head") / "run"
    rows = workdir.with_name("rows.jsonl")
    rows.write_text("".join(tiny.TRAIN.read_text().splitlines(keepends=True)[:16]))
    flags = {
        "model.path": tiny.BASE,
        "model.dtype": "bfloat16",
        "tune.method": "head",
        "data.train": rows,
        "data.cache": "false",
        "train.steps": 2,
        "log.tensorboard": "false",
    }
    argv = [f"--config.{name}={value}" for name, value in flags.items()]
    assert cli.main(["train", *argv, f"--workdir={workdir}"]) == 0
    return workdir


def test_frozen_weights_are_written_as_they_were_stored(run):
    before, after = load_file(tiny.BASE / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    trained = {"lm_head.weight", "model.norm.weight"}
    assert set(after) - set(before) == {"lm_head.weight"}
    for name in set(before) - trained:
        np.testing.assert_array_equal(after[name], before[name])
    assert not np.array_equal(after["model.norm.weight"], before["model.norm.weight"])


def test_an_untied_head_is_said_so_in_config_and_card(run):
    assert json.loads((run / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "matrix of its own" in (run / "model" / "README.md").read_text()


def test_the_run_directory_holds_what_the_contract_says(run):
    names = {p.name for p in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "model", "summary.json", "report.html"} <= names
    summary = json.loads((run / "summary.json").read_text())
    assert summary["trainable"] == 128 + 128 * 1536
