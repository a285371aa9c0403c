r"""Teach a small T5, from random weights, to turn a customer's message into one line of strict JSON.

    python examples/tiny/t5.py --out=runs/t5
    jaxtune train --config=configs/seq2seq.py --workdir=runs/seq2seq

For a pretrained T5, mT5 or FLAN-T5 leave out `model.init` and give its directory or hub id as `model.path`; it takes
`tune.method=lora` and a tenth of the rate.

Expected: the evaluation loss begins at 7.82; after 150 steps the training loss is 0.72 (measured in a run of 6 epochs,
on 2 busy CPU cores, and not to its end).
"""

from importlib.resources import files

from common import recipe


def get_config():
    tiny = files("jaxtune") / "assets" / "tiny"
    config = recipe("full")
    config.model = {"path": "runs/t5", "init": "random"}
    config.data.train = str(tiny / "train.jsonl")
    config.data.eval = str(tiny / "eval.jsonl")
    config.data.max_length = 64
    config.data.max_target_length = 64
    config.objective = {"name": "seq2seq"}
    config.optim.lr = 3e-3
    config.train.epochs = 10
    config.evaluate = {"metrics": ("json_valid", "json_exact"), "rows": 200, "max_new_tokens": 48}
    return config
