"""Runs of trl's trainers, to compare ours with: a step of all rows, no clipping, no dropout, a constant rate."""

STEPS, RATE = 30, 1e-3
# The same for our command.
OURS = {
    **{"data__eval": None, "train__eval_every": None, "tune__method": "full", "tune__lora__r": None},
    **{"tune__lora__lora_dropout": None, "optim__lr": RATE, "optim__schedule": "constant", "optim__warmup": 0},
    **{"optim__grad_clip": 0, "train__steps": STEPS},
}


def losses(trainer, config, model, rows, folder, **settings):
    """The losses of `STEPS` steps of a trainer on a model, its tokenizer read from `model.name_or_path`."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    found = []

    class Kept(trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            found.append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss

    settings = config(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_length=64,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    Kept(model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    return found
