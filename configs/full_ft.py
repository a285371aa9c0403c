r"""Fine-tuning of all weights.

    jaxtune train --config=configs/full_ft.py --workdir=runs/full \
        --config.model.path=DIR_OR_ID --config.data.train=train.jsonl --config.data.eval=test.jsonl

Weights and both AdamW moments are float32: plan for about 16 bytes a parameter, gradients included.
--config.model.remat=full and --config.train.grad_accum=4 trade time for memory.

Expected: `eval/loss` falls, and the workdir ends with `model/`, a Hugging Face directory.
"""

from common import recipe


def get_config():
    config = recipe("full")
    config.optim.lr = 1e-5
    config.optim.weight_decay = 0.01
    return config
