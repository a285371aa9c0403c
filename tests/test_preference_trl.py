"""Runs of DPO and KTO beside those of trl's trainers, on the same rows from the same weights."""

import json

import pytest
from runs import command, home, read, write_jsonl  # noqa: F401

from jaxtune.cli import main

ROWS, STEPS, RATE = 8, 30, 1e-3


def dpo_rows():
    return [{"prompt": f"{i} is ", "chosen": f"{i} and {i}.", "rejected": f"no {i}"} for i in range(ROWS)]


def kto_rows():
    return [
        {"prompt": f"{i} is ", "completion": f"{i}{i} or so." if i % 3 else f"no {i}", "label": bool(i % 3)}
        for i in range(ROWS)
    ]


def trl_losses(kind, model, rows, folder):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    if kind == "preference":
        config, trainer = DPOConfig, DPOTrainer
    else:
        from trl import KTOConfig, KTOTrainer

        config, trainer = KTOConfig, KTOTrainer
    losses = []

    class Kept(trainer):
        def compute_loss(self, *args, **kwargs):
            found = super().compute_loss(*args, **kwargs)
            losses.append(float(found[0] if isinstance(found, tuple) else found))
            return found

    settings = config(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_length=64,
        beta=0.1,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        disable_dropout=True,
        **({"train_sampling_strategy": "sequential"} if kind == "kto" else {}),
    )
    torch.manual_seed(0)
    Kept(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    ).train()
    return losses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # trl's own
@pytest.mark.parametrize(("kind", "rows"), [("preference", dpo_rows()), ("kto", kto_rows())])
def test_thirty_steps_are_those_of_trl(home, tmp_path, kind, rows):  # noqa: F811
    """Every step takes all rows, so that their order does not matter."""
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = {
        **{"data__train": file, "data__eval": None, "train__eval_every": None, "objective__name": kind},
        **{"tune__method": "full", "tune__lora__r": None, "tune__lora__lora_dropout": None, "optim__lr": RATE},
        **{"optim__schedule": "constant", "optim__warmup": 0, "optim__grad_clip": 0, "train__batch_size": ROWS},
    }
    argv = command(home, tmp_path / "run", train__steps=STEPS, **settings)
    assert main(argv) == 0
    ours = [line["train/loss"] for line in read(tmp_path / "run") if "train/loss" in line]
    theirs = trl_losses(kind, home / "model", [json.loads(json.dumps(row)) for row in rows], tmp_path / "trl")
    assert len(ours) == len(theirs) == STEPS and ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, abs=1e-4)
