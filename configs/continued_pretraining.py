r"""Continued pretraining of all weights on plain text, packed into full sequences.

    jaxtune train --config=configs/continued_pretraining.py --workdir=runs/cpt \
        --config.model.path=DIR_OR_ID --config.data.train=corpus.jsonl --config.data.eval_fraction=0.01

A row is {"text": "..."}. Against forgetting, mix in some of the general text the model knows:
--config.data.train=corpus.jsonl,general.jsonl --config.data.weights=0.8,0.2

Expected: `eval/loss` falls, and the workdir ends with `model/`, a Hugging Face directory.

Measured: stories260k on WikiText-2's validation text (data.eval_fraction=0.05, data.max_length=512), 40 steps of 8
packed rows, optim.lr=1e-3: `eval/loss` 5.062 -> 2.948.
"""

from common import recipe


def get_config():
    config = recipe("full")
    config.data.format = "text"
    config.data.packing = True
    config.data.overlength = "split"
    config.optim.lr = 5e-6
    config.optim.weight_decay = 0.1
    config.optim.b2 = 0.95
    config.optim.min_lr_ratio = 0.1
    return config
