r"""Only the final norm and the LM head; the body stays as it was, also where head and embedding are tied.

    jaxtune train --config=configs/head.py --workdir=runs/head \
        --config.model.path=DIR_OR_ID --config.data.train=train.jsonl --config.data.eval=test.jsonl

Expected: `eval/loss` falls, and the workdir ends with `model/`, a Hugging Face directory.

Measured: stories260k on WikiSQL (data.completion_from=A:, data.max_length=512), 60 steps of 8 rows, optim.lr=5e-3:
`eval/loss` 7.175 -> 3.025.
"""

from common import recipe


def get_config():
    config = recipe("head")
    config.optim.lr = 1e-3
    return config
