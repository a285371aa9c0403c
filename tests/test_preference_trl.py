"""Runs of DPO and KTO beside those of trl's trainers, on the same rows from the same weights."""

import json

import pytest
import trl_runs
from runs import command, home, read, write_jsonl  # noqa: F401

from jaxtune.cli import main

ROWS = 8


def dpo_rows():
    return [{"prompt": f"{i} is ", "chosen": f"{i} and {i}.", "rejected": f"no {i}"} for i in range(ROWS)]


def kto_rows():
    return [
        {"prompt": f"{i} is ", "completion": f"{i}{i} or so." if i % 3 else f"no {i}", "label": bool(i % 3)}
        for i in range(ROWS)
    ]


def trl_losses(kind, model, rows, folder):
    import torch
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    chosen = (DPOTrainer, DPOConfig) if kind == "preference" else (KTOTrainer, KTOConfig)
    more = {"train_sampling_strategy": "sequential"} if kind == "kto" else {}
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    how = {"beta": 0.1, "precompute_ref_log_probs": True, "disable_dropout": True} | more
    return trl_runs.losses(*chosen, policy, rows, folder, **how)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # trl's own
@pytest.mark.parametrize(("kind", "rows"), [("preference", dpo_rows()), ("kto", kto_rows())])
def test_thirty_steps_are_those_of_trl(home, tmp_path, kind, rows):  # noqa: F811
    """Every step takes all rows, so that their order does not matter."""
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = trl_runs.OURS | {"data__train": file, "objective__name": kind, "train__batch_size": ROWS}
    argv = command(home, tmp_path / "run", **settings)
    assert main(argv) == 0
    ours = [line["train/loss"] for line in read(tmp_path / "run") if "train/loss" in line]
    theirs = trl_losses(kind, home / "model", [json.loads(json.dumps(row)) for row in rows], tmp_path / "trl")
    assert len(ours) == len(theirs) == trl_runs.STEPS and ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, abs=1e-4)
