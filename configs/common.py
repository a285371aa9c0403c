"""What the fine-tuning configs share. A config returns overrides only; `jaxtune train --help` lists every setting."""

from ml_collections import ConfigDict


def recipe(method: str, **tune) -> ConfigDict:
    """Overrides to tune by `method`: 16 rows a step, a short warmup, then a cosine to zero."""
    return ConfigDict(
        {
            "tune": {"method": method, **tune},
            "data": {},
            "optim": {"schedule": "cosine", "warmup": 0.03},
            "train": {"batch_size": 16},
        }
    )
