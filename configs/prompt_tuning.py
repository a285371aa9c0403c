r"""Prompt tuning (arXiv:2104.08691): 20 vectors before each row are all that is trained.

    jaxtune train --config=configs/prompt_tuning.py --workdir=runs/prompt \
        --config.model.path=DIR_OR_ID --config.data.train=train.jsonl --config.data.eval=test.jsonl

The vectors count towards data.max_length.

Expected: `eval/loss` falls, more slowly than with LoRA and less on small models, and the workdir ends with `adapter/`,
a PEFT directory of 20 x width numbers. It cannot be merged; `jaxtune generate runs/prompt` and peft put it first.

Measured: stories260k on WikiSQL (data.completion_from=A:, data.max_length=512), 60 steps of 8 rows, optim.lr=0.1:
`eval/loss` 7.201 -> 4.887. configs/lora_sft.py gives 1.968 at 5e-3.
"""

from common import recipe


def get_config():
    config = recipe("prompt_tuning", prompt_tuning={"num_virtual_tokens": 20, "init": "vocab"})
    config.optim.lr = 3e-2
    return config
