r"""Prompt or fine-tune? A task that the packaged base was pretrained on: a prompt in its own words wins.

    jaxtune decide --config=configs/decide_orders.py --prompt=examples/prompts/question.txt \
        --prompt=examples/prompts/instruction.txt

A row: "Is it too late to cancel this white kettle? Reference H1972." is completed by "H1972". The base has read
messages that are followed by "Question: Which order is it?", and has never read an instruction.

Expected: 18 s on 2 CPU cores. Of 200 held-out rows the question has 100% [98.2, 100] right, the instruction 0%, the
rows as they are 0%, four examples 2% to 4%. Nothing is tuned, since 1.8 points are left to gain at most. With 60
held-out rows (--rows=60) that cannot be told, and LoRA on 540 rows has 100% as well: no evidence that tuning helps.
"""

from importlib.resources import files

from common import recipe


def get_config():
    tiny = files("jaxtune") / "assets" / "tiny"
    config = recipe("lora", lora={"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
    config.model = {"path": str(tiny / "base")}
    config.data.train = str(tiny / "orders.jsonl")
    config.optim.lr = 4e-3
    config.train.epochs = 3
    return config
