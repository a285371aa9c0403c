r"""ORPO with LoRA: fine-tuning on the better answers and away from the worse ones at once, without a reference.

    jaxtune train --config=configs/orpo.py --workdir=runs/orpo \
        --config.model.path=DIR_OR_ID --config.data.train=pairs.jsonl

Rows are those of configs/dpo.py. SimPO, which has no reference either: --config.objective.loss=simpo

Expected: `eval/loss` falls, `eval/accuracy` rises, and the workdir ends with `adapter/`.
"""

from common import recipe


def get_config():
    config = recipe("lora", lora={"r": 16, "lora_alpha": 32})
    config.objective = {"name": "preference", "loss": ("orpo",)}
    config.data.eval_fraction = 0.1
    config.optim.lr = 1e-4
    config.train.batch_size = 8
    return config
