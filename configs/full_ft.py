r"""Fine-tuning of all weights.

    jaxtune train --config=configs/full_ft.py --workdir=runs/full \
        --config.model.path=DIR_OR_ID --config.data.train=train.jsonl --config.data.eval=test.jsonl

Weights and both AdamW moments are float32: plan for about 16 bytes a parameter, gradients included.
--config.model.remat=full and --config.train.grad_accum=4 trade time for memory.

Expected: `eval/loss` falls, and the workdir ends with `model/`, a Hugging Face directory.

Measured: stories260k on WikiSQL (data.completion_from=A:, data.max_length=512), 60 steps of 8 rows, optim.lr=1e-3:
`eval/loss` 7.175 -> 1.828.
"""

from common import recipe


def get_config():
    config = recipe("full")
    config.optim.lr = 1e-5
    config.optim.weight_decay = 0.01
    return config
