r"""A label for each word, such as named entities, with all weights trained.

    jaxtune train --config=configs/token_classification.py --workdir=runs/entities \
        --config.model.path=DIR_OR_ID --config.data.train=train.conll --config.data.eval=dev.conll

A .conll file has a word a line, with its tag in the last field, and a blank line behind each sentence. Other files have
two columns of lists, tokens and labels; under other names: --config.data.columns=tokens=words,labels=ner_tags

Expected: `eval/entity_f1` rises (tags such as B-person, I-person and O), and the workdir ends with `model/`, which
transformers.AutoModelForTokenClassification loads.

Measured: all-MiniLM-L6-v2 on wnut17, one epoch (213 steps of 16 rows), optim.lr=3e-4, data.group_by_length=true: entity
F1 0.413 on the test file (one seed); transformers on the same batches 0.403.
"""

from common import recipe


def get_config():
    config = recipe("full")
    config.objective = {"name": "token_classification"}
    config.data.overlength = "truncate"
    config.optim.lr = 5e-5
    config.optim.weight_decay = 0.01
    return config
