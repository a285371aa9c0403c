"""Pretrain the tiny base model that the package carries, from nothing.

    python -m jaxtune.tiny.build --out=runs/tiny
    jaxtune train --config=configs/pretrain_tiny.py --workdir=runs/tiny/pretrain
    jaxtune export runs/tiny/pretrain --out=runs/tiny/exported

The first command writes the texts, the tokenizer and the model's config (seconds); the second trains all 1.4M weights
on them; the third makes the Hugging Face directory that stands in jaxtune/assets/tiny/base.

Expected: about 40 minutes on 2 CPU cores.
"""

from common import recipe


def get_config():
    config = recipe("full")
    config.model = {"path": "runs/tiny/base", "init": "random"}
    config.data.train = "runs/tiny/pretrain.jsonl"
    config.data.format = "text"
    config.data.max_length = 256
    config.data.packing = True
    config.optim.lr = 3e-3
    config.optim.min_lr_ratio = 0.05
    config.optim.weight_decay = 0.1
    config.optim.b2 = 0.95
    config.train.batch_size = 16
    config.train.epochs = 1  # 19M tokens, about 4,600 steps
    return config
