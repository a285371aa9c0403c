"""Write the tiny world to disk: `python examples/tiny/build.py --out=DIR`.

    DIR/base/            config and tokenizer of the base model, without weights
    DIR/pretrain.jsonl   the base model's reading, column `text`
    DIR/train.jsonl      messages and their JSON, columns `prompt` and `completion`
    DIR/eval.jsonl       the same for combinations held out from both files above
    DIR/general.jsonl    what the base can do besides, columns `domain`, `prompt` and `completion`
    DIR/orders.jsonl     messages and the order that they name, columns `prompt` and `completion`

The same seed gives the same bytes. `jaxtune/assets/tiny` holds all but `pretrain.jsonl`, and the
weights trained on that.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

from corpus import documents, general, orders
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from world import rows

SEED = 0
VOCAB_SIZE = 1536
TOKENIZER_DOCUMENTS = 20_000
EOS, PAD = "</s>", "<pad>"

# Single digits, and the letter and the space before them alone, so that "A4821" is the same five tokens wherever it
# stands; words with the space before them; punctuation up to an opening quote, so that `": "` is one token.
SPLIT = r"""\p{N}|\p{L}(?=\p{N})| (?=\p{L}?\p{N})|'\p{L}{1,2}\b| ?\p{L}+| ?[^\s\p{L}\p{N}]+(?: ")?|\s"""

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.05,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "use_cache": True,
}


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train a byte-level BPE tokenizer; every text comes back unchanged from `decode(encode(text))`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_base(path: Path, tokenizer: Tokenizer) -> None:
    """Write an HF model directory that lacks only its weights."""
    path.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.token_to_id(EOS), "pad_token_id": tokenizer.token_to_id(PAD)}
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(path / "config.json", MODEL_CONFIG | ids | {"vocab_size": tokenizer.get_vocab_size()})
    _write_json(path / "generation_config.json", ids | {"do_sample": False, "max_new_tokens": 64})
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "pad_token": PAD,
            "model_max_length": MODEL_CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    )


def build(
    out: Path,
    seed: int = SEED,
    pretrain_documents: int = 400_000,
    tokenizer_documents: int = TOKENIZER_DOCUMENTS,
    train_rows: int = 4_000,
    eval_rows: int = 300,
    general_rows: int = 240,
    order_rows: int = 600,
) -> None:
    """Write everything the module's docstring lists under `out`.

    Each file has a random sequence of its own, so one file's size does not change another's content.
    """
    sample = documents(Random(f"{seed}/pretrain"), min(tokenizer_documents, pretrain_documents))
    write_base(out / "base", train_tokenizer(sample))
    texts = documents(Random(f"{seed}/pretrain"), pretrain_documents)
    _write_jsonl(out / "pretrain.jsonl", ({"text": text} for text in texts))
    _write_jsonl(out / "train.jsonl", rows(Random(f"{seed}/train"), train_rows))
    _write_jsonl(out / "eval.jsonl", rows(Random(f"{seed}/eval"), eval_rows, held_out=True))
    _write_jsonl(out / "general.jsonl", general(Random(f"{seed}/general"), general_rows))
    _write_jsonl(out / "orders.jsonl", orders(Random(f"{seed}/orders"), order_rows))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_jsonl(path: Path, records: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python examples/tiny/build.py", description="Write the tiny world to disk.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write into")
    parser.add_argument("--seed", type=int, default=SEED, help="another seed makes another world (default: 0)")
    options = parser.parse_args()
    build(options.out, options.seed)
    print(
        f"Wrote {options.out}: base/ (no weights), pretrain.jsonl, train.jsonl, eval.jsonl, general.jsonl, orders.jsonl"
    )


if __name__ == "__main__":
    main()
