"""Write the config and tokenizer of a small T5 without weights: `python examples/tiny/t5.py --out=DIR`.

The tokenizer is that of the packaged tiny model. `model.init=random` trains such a directory from nothing.
"""

import argparse
import json
import shutil
from pathlib import Path

from jaxtune import tiny

CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


def write(folder: Path) -> None:
    """Write config.json, tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    base = json.loads((tiny.BASE / "config.json").read_text(encoding="utf-8"))
    tokens = {name: base[name] for name in ("vocab_size", "eos_token_id", "pad_token_id")}
    config = CONFIG | tokens | {"decoder_start_token_id": base["pad_token_id"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.BASE / name, folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    write(parser.parse_args().out)
