r"""Supervised fine-tuning with LoRA on every linear layer.

    jaxtune train --config=configs/lora_sft.py --workdir=runs/lora \
        --config.model.path=DIR_OR_ID --config.data.train=train.jsonl --config.data.eval=test.jsonl

Columns with other names: --config.data.columns=prompt=question,completion=answer

Expected: `eval/loss` falls, and the workdir ends with `adapter/`, a PEFT directory.

Measured: stories260k on WikiSQL (data.completion_from=A:, data.max_length=512), 60 steps of 8 rows, optim.lr=5e-3:
`eval/loss` 7.175 -> 1.968.
"""

from common import recipe


def get_config():
    return recipe("lora", lora={"r": 16, "lora_alpha": 32})
