r"""Classification of texts by a label head over a frozen model, which is an encoder or a decoder.

    jaxtune train --config=configs/classify_head.py --workdir=runs/classify \
        --config.model.path=DIR_OR_ID --config.data.train=train.csv --config.data.eval=test.csv

Columns are text and label; others: --config.data.columns=text=sentence,label=category

Expected: `eval/accuracy` and `eval/macro_f1` rise, and the workdir ends with `model/`, which
transformers.AutoModelForSequenceClassification loads.
"""

from common import recipe


def get_config():
    config = recipe("head")
    config.objective = {"name": "sequence_classification"}
    config.data.overlength = "truncate"
    config.optim.lr = 1e-3
    config.train.batch_size = 32
    return config
