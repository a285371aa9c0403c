r"""Classification of texts with LoRA on every linear layer; the label head is trained whole beside it.

    jaxtune train --config=configs/classify_lora.py --workdir=runs/classify \
        --config.model.path=DIR_OR_ID --config.data.train=train.csv --config.data.eval=test.csv

Columns are text and label; others: --config.data.columns=text=sentence,label=category

Expected: `eval/accuracy` and `eval/macro_f1` rise, and the workdir ends with `adapter/`, a PEFT directory of task type
SEQ_CLS that holds the label head.

Measured: all-MiniLM-L6-v2 on banking77, one epoch, objective.pooling=mean, data.group_by_length=true, optim.lr=3e-3:
test accuracy 0.903, 0.907, 0.906 (three seeds); peft on the same batches 0.902, 0.914, 0.905.
"""

from common import recipe


def get_config():
    config = recipe("lora", lora={"r": 16, "lora_alpha": 32})
    config.objective = {"name": "sequence_classification"}
    config.data.overlength = "truncate"
    config.optim.lr = 5e-4
    config.train.batch_size = 32
    return config
