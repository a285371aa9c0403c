"""The packaged tiny model and its data: messages to a shop, answered with JSON.

`python examples/tiny/build.py --out=DIR` generates the texts; `configs/pretrain_tiny.py` has the commands that follow.
"""

from pathlib import Path

ASSETS = Path(__file__).parents[0] / "assets" / "tiny"
BASE = ASSETS / "base"  # a Hugging Face directory
TRAIN = ASSETS / "train.jsonl"
EVAL = ASSETS / "eval.jsonl"
