r"""Only the final norm and the LM head; the body stays as it was, also where head and embedding are tied.

    jaxtune train --config=configs/head.py --workdir=runs/head \
        --config.model.path=DIR_OR_ID --config.data.train=train.jsonl --config.data.eval=test.jsonl

Expected: `eval/loss` falls, and the workdir ends with `model/`, a Hugging Face directory.
"""

from common import recipe


def get_config():
    config = recipe("head")
    config.optim.lr = 1e-3
    return config
