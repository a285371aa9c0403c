r"""Teach the packaged tiny model to turn a customer's message into one line of strict JSON. No network, no GPU.

    jaxtune train --config=configs/quickstart.py --workdir=runs/quickstart

A row: "Message: I'd like to return two blue mugs from order A4821.\nJSON:\n" is completed by
{"intent": "return", "product": "mug", "colour": "blue", "quantity": 2, "order": "A4821"}

The model has read messages and agents' notes in plain language, never JSON after a message; the held-out messages ask
for combinations of intent, product and colour that it has seen in no text at all.

Expected: about a minute on 2 CPU cores; of 200 held-out messages, valid JSON 0% before and 100% after, all fields right
0% before and 100% after.
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
    config.train.steps = 120
    config.evaluate = {"metrics": ("json_valid", "json_exact"), "rows": 200, "max_new_tokens": 48}
    return config
