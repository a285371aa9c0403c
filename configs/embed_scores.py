r"""Vectors of texts from scores of how alike two texts are: cosines in the order of the scores (CoSENT).

    jaxtune train --config=configs/embed_scores.py --workdir=runs/scores \
        --config.model.path=DIR_OR_ID --config.data.train=scores.csv

Columns are sentence1, sentence2 and score, a number of any scale.

Expected: `eval/loss` falls, and `jaxtune eval runs/scores` gives Spearman's and Pearson's correlation of the cosines
with the held-out scores, of the base and of the result.

Not measured: no real scores were at hand.
"""

from common import recipe


def get_config():
    config = recipe("lora", lora={"r": 16, "lora_alpha": 32})
    config.objective = {"name": "embedding", "contrast": "cosent"}
    config.data.overlength = "truncate"
    config.data.eval_fraction = 0.1
    config.optim.lr = 2e-4
    config.train.batch_size = 32
    return config
