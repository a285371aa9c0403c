r"""Direct preference optimisation with LoRA: pairs of a better and a worse answer to one prompt.

    jaxtune train --config=configs/dpo.py --workdir=runs/dpo \
        --config.model.path=DIR_OR_ID --config.data.train=pairs.jsonl

Columns are prompt, chosen, rejected, as texts or messages; others: --config.data.columns=chosen=better,rejected=worse
Another loss over the same pairs: --config.objective.loss=ipo (or several: sigmoid,ipo with objective.loss_weights).

Expected: `eval/loss` falls from 0.693, `eval/accuracy` and `eval/margins` rise, and the workdir ends with `adapter/`.

Measured: the packaged base (model.path=jaxtune/assets/tiny/base) on the 200 pairs of docs/preferences.md, one epoch,
optim.lr=1e-3, objective.sft_weight=1: of 20 held-out pairs accuracy 50% -> 100% [83, 100], margin of the rewards 0 ->
9.4; all of 4 samples are a note in prose before and the short answer after. stories260k on 300 real pairs:
benchmarks/RESULTS.md (objective.loss=sigmoid_norm gains, plain DPO hardly).
"""

from common import recipe


def get_config():
    config = recipe("lora", lora={"r": 16, "lora_alpha": 32})
    config.objective = {"name": "preference", "loss": ("sigmoid",), "beta": 0.1}
    config.data.eval_fraction = 0.1
    config.optim.lr = 2e-5
    config.train.batch_size = 8
    config.train.best = "eval/accuracy"
    return config
