r"""A reward model: one number for a text, learnt from pairs of a better and a worse answer to one prompt.

    jaxtune train --config=configs/reward.py --workdir=runs/reward \
        --config.model.path=DIR_OR_ID --config.data.train=pairs.jsonl

Columns are prompt, chosen, rejected, as texts or messages, and may be margin. Then score the answers of another model:

    jaxtune eval RUN --scorer=reward:runs/reward

Expected: `eval/loss` falls from about 0.69 and `eval/accuracy` rises; `adapter/` loads into transformers'
AutoModelForSequenceClassification.

Measured: the packaged base (model.path=jaxtune/assets/tiny/base) on the 200 pairs of docs/preferences.md, one epoch at
this rate: `eval/loss` 0.841 -> 0.032, and of 20 held-out pairs accuracy 100% [83, 100], margin of the scores 4.0.
"""

from common import recipe


def get_config():
    config = recipe("lora", lora={"r": 16, "lora_alpha": 32})
    config.objective = {"name": "reward", "centering": 0.01}
    config.data.eval_fraction = 0.1
    config.optim.lr = 2e-4
    config.train.batch_size = 8
    config.train.best = "eval/accuracy"
    return config
