"""The tiny world: a generator of shop texts, from which the packaged base model and its tuning data are made.

`python examples/tiny/build.py --out=DIR` writes all of it; `configs/pretrain_tiny.py` has the commands that follow.
"""

from pathlib import Path

ASSETS = Path(__file__).parents[0] / "assets" / "tiny"
BASE = ASSETS / "base"  # a Hugging Face directory
TRAIN = ASSETS / "train.jsonl"
EVAL = ASSETS / "eval.jsonl"
