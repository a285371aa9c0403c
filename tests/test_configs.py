"""Every config of configs/ passes every check of `--dry-run` on a small model, and its docstring says how to run it."""

import ast
import json
import runpy
from pathlib import Path

import pytest
from runs import write_jsonl
from test_classification_runs import write_encoder

from jaxtune import cli, tiny

CONFIGS = sorted(p for p in (Path(__file__).parents[1] / "configs").glob("*.py") if p.stem != "common")
TEXT = {"text": "The shop sells mugs and lamps. Today a customer asked for two blue mugs."}
ROWS = {
    "pretrain_tiny": TEXT,
    "continued_pretraining": TEXT,
    **{name: {"prompt": "Two mugs?", "chosen": "Of course.", "rejected": "No."} for name in ("dpo", "orpo", "reward")},
    "chat_lora": {
        "messages": [{"role": "user", "content": "Two mugs?"}, {"role": "assistant", "content": "Of course."}]
    },
}

LABELLED = {
    "token_classification": {"tokens": ["Two", "mugs"], "labels": ["B-number", "O"]},
    **{f"classify_{method}": {"text": "Two mugs?", "label": "order"} for method in ("head", "lora", "full")},
    "decide_banking77": {"text": "Two mugs?", "label": "order"},
}
COMPARED = {
    "embed_mnrl": [{"anchor": f"{n} mugs?", "positive": f"Here are {n}."} for n in range(8)],
    "rerank": [{"query": f"{n} mugs?", "positive": f"Here are {n}.", "negative": "No mugs."} for n in range(8)],
    "embed_scores": [{"sentence1": "Two mugs?", "sentence2": f"{n} mugs.", "score": n / 8} for n in range(8)],
}


def labelled(folder, name: str) -> list[str]:
    """An encoder and two rows."""
    (folder / "model").mkdir()
    write_encoder(folder / "model")
    other = {"tokens": ["blue"], "labels": ["O"]} if name.startswith("token") else {"text": "blue", "label": "colour"}
    file = write_jsonl(folder / "rows.jsonl", [LABELLED[name], other])
    return [f"--config.model.path={folder}/model", f"--config.data.train={file}"]


@pytest.fixture
def flags(tmp_path):
    """What a config leaves to the user: a model and data in its format."""

    def make(name: str) -> list[str]:
        if name == "quickstart":
            return []
        if name == "seq2seq":
            t5 = runpy.run_path(str(CONFIGS[0].parents[1] / "examples" / "tiny" / "t5.py"))
            t5["write"](tmp_path / "t5")
            return [f"--config.model.path={tmp_path}/t5"]
        if name == "distill":
            return [f"--config.objective.teacher={tiny.BASE}"]
        if name in LABELLED:
            return labelled(tmp_path, name)
        if name in COMPARED:
            (tmp_path / "model").mkdir()
            write_encoder(tmp_path / "model")
            file = write_jsonl(tmp_path / "rows.jsonl", COMPARED[name])
            given = f"--config.model.path={tmp_path}/model", f"--config.data.train={file}"
            return [*given, "--config.data.eval_fraction=0.0"]
        rows = [ROWS.get(name, {"prompt": "Two mugs?", "completion": "Of course."})] * 8
        if name == "kto":
            rows = [rows[0] | {"label": i % 2 == 0} for i in range(8)]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [f"--config.model.path={tiny.BASE}", f"--config.data.train={file}", "--config.data.eval_fraction=0.0"]

    return make


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_dry_run(config, flags, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    status = cli.main(["train", f"--config={config}", *flags(config.stem), "--dry-run"])
    out = capsys.readouterr()
    assert status == 0, out.err
    assert "trainable params: " in out.out and "every check passed" in out.out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_docstring_has_the_command_and_what_to_expect(config):
    text = ast.get_docstring(ast.parse(config.read_text()))
    assert f"--config=configs/{config.name}" in text
    assert "Expected:" in text
