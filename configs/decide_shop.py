r"""Prompt or fine-tune? The packaged task, which the base has never seen: tuning wins.

    jaxtune decide --config=configs/decide_shop.py --price='0.2 USD per 1M tokens'

A row: "Message: I'd like to return two blue mugs from order A4821.\nJSON:\n" is completed by
{"intent": "return", "product": "mug", "colour": "blue", "quantity": 2, "order": "A4821"}

Expected: 2 min 16 s on 2 CPU cores. Of 200 held-out messages every field is right in 0% [0, 1.8] with the rows as they
are and with four examples, at random or similar by BM25; with LoRA on 250 rows 92% [88, 95.5], on 1,000 rows 91.5%, on
4,000 rows 100% [98.2, 100], which costs 0.047 USD at this price and pays from its first right answer on.
"""

from importlib.resources import files

from common import recipe


def get_config():
    tiny = files("jaxtune") / "assets" / "tiny"
    config = recipe("lora", lora={"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
    config.model = {"path": str(tiny / "base")}
    config.data.train = str(tiny / "train.jsonl")
    config.data.eval = str(tiny / "eval.jsonl")
    config.data.max_length = 256
    config.data.packing = True
    config.optim.lr = 4e-3
    config.train.batch_size = 8  # sequences of 256 tokens, about 36 messages
    config.train.steps = 120  # on all rows; on fewer a third at least
    return config
