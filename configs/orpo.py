r"""ORPO with LoRA: fine-tuning on the better answers and away from the worse ones at once, without a reference.

    jaxtune train --config=configs/orpo.py --workdir=runs/orpo \
        --config.model.path=DIR_OR_ID --config.data.train=pairs.jsonl

Rows are those of configs/dpo.py. SimPO, which has no reference either: --config.objective.loss=simpo

Expected: `eval/loss` falls, `eval/accuracy` rises, and the workdir ends with `adapter/`.

Measured: the packaged base (model.path=jaxtune/assets/tiny/base) on the 200 pairs of docs/preferences.md, one epoch,
optim.lr=1e-3: `eval/loss` 10.69 -> 0.072, of 20 held-out pairs accuracy 0% [0, 17] -> 100% [83, 100], margin -0.47 ->
0.78; all of 4 samples are a note in prose before and the short answer after.
"""

from common import recipe


def get_config():
    config = recipe("lora", lora={"r": 16, "lora_alpha": 32})
    config.objective = {"name": "preference", "loss": ("orpo",)}
    config.data.eval_fraction = 0.1
    config.optim.lr = 1e-4
    config.train.batch_size = 8
    return config
