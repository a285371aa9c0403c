r"""LoRA over a base in 4 bits (QLoRA, arXiv:2305.14314): the body is quantised to NF4 as it is read, layer by layer.

    jaxtune train --config=configs/qlora.py --workdir=runs/qlora \
        --config.model.path=DIR_OR_ID --config.data.train=train.jsonl --config.data.eval=test.jsonl

The body's matrices take 4.13 bits a weight instead of 16 or 32; the embedding and the output head stay as they are.
`jaxtune plan` counts 12.5 GiB for one packed row of 4,096 tokens through Llama 3.1 8B with --config.model.remat=full in
bfloat16, 15.0 with remat=attention, and 150 with everything kept.

Expected: `eval/loss` begins a little higher than without quantisation and falls as configs/lora_sft.py's does. The
adapter was trained on the rounded base: over the published one it is a little off, as every QLoRA adapter is.

Measured: stories260k on WikiSQL (data.completion_from=A:, data.max_length=512), 60 steps of 8 rows, optim.lr=5e-3:
`eval/loss` 7.114 -> 1.988. configs/lora_sft.py, without quantisation: 7.175 -> 1.968.
"""

from common import recipe


def get_config():
    config = recipe("lora", lora={"r": 16, "lora_alpha": 32})
    config.model = {"quantization": "nf4"}
    return config
