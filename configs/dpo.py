r"""Direct preference optimisation with LoRA: pairs of a better and a worse answer to one prompt.

    jaxtune train --config=configs/dpo.py --workdir=runs/dpo \
        --config.model.path=DIR_OR_ID --config.data.train=pairs.jsonl

Columns are prompt, chosen, rejected, as texts or messages; others: --config.data.columns=chosen=better,rejected=worse
Another loss over the same pairs: --config.objective.loss=ipo (or several: sigmoid,ipo with objective.loss_weights).

Expected: `eval/loss` falls from 0.693, `eval/accuracy` and `eval/margins` rise, and the workdir ends with `adapter/`.
"""

from common import recipe


def get_config():
    config = recipe("lora", lora={"r": 16, "lora_alpha": 32})
    config.objective = {"name": "preference", "loss": ("sigmoid",), "beta": 0.1}
    config.data.eval_fraction = 0.1
    config.optim.lr = 2e-5
    config.train.batch_size = 8
    config.train.best = "eval/accuracy"
    return config
