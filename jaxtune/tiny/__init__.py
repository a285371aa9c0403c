"""The tiny world: a generator of shop texts, from which the packaged base model and its tuning data are made.

`python -m jaxtune.tiny.build --out=DIR` writes all of it; `configs/pretrain_tiny.py` has the commands that follow.
"""
