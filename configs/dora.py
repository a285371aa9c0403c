r"""Supervised fine-tuning with DoRA (arXiv:2402.09353): LoRA with the magnitude of each column trained apart.

    jaxtune train --config=configs/dora.py --workdir=runs/dora \
        --config.model.path=DIR_OR_ID --config.data.train=train.jsonl --config.data.eval=test.jsonl

Expected: `eval/loss` falls, and the workdir ends with `adapter/`, a PEFT directory with use_dora. peft loads it; vLLM
does not: `jaxtune export runs/dora merged/` writes a plain model.

Measured: stories260k on WikiSQL (data.completion_from=A:, data.max_length=512), 60 steps of 8 rows, optim.lr=5e-3:
`eval/loss` 7.175 -> 1.971. configs/lora_sft.py gives 1.968.
"""

from common import recipe


def get_config():
    return recipe("lora", lora={"r": 16, "lora_alpha": 32, "use_dora": True})
