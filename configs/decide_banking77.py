r"""Which way to learn labels? A head over a frozen encoder, LoRA on three numbers of rows, or a vote of similar rows.

    jaxtune decide --config=configs/decide_banking77.py --model=DIR_OR_ID --data=train.csv --eval=test.csv --rows=1000

Columns are text and label; others: --config.data.columns=text=sentence,label=category

Expected: MEASURE
"""

from common import recipe


def get_config():
    config = recipe("lora", lora={"r": 16, "lora_alpha": 32})
    config.objective = {"name": "sequence_classification", "pooling": "mean"}
    config.data.overlength = "truncate"
    config.data.group_by_length = True
    config.optim.lr = 3e-3
    config.train.batch_size = 32
    config.train.epochs = 1  # of all rows; on fewer a third of its steps at least. The head is trained for 20
    return config
