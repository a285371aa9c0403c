"""The tiny world: the same bytes from the same seed, rows that say what their JSON says, and the packaged files."""

import hashlib
import json
import re
import sys
from importlib.resources import files
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1] / "examples" / "tiny")
)  # the generator, which is not packaged

import build
import corpus
import world

ASSETS = Path(str(files("jaxtune"))) / "assets" / "tiny"


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train_rows():
    return read("train.jsonl")


@pytest.fixture(scope="module")
def eval_rows():
    return read("eval.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(ASSETS / "base" / "tokenizer.json"))


def digests(path: Path) -> dict[str, str]:
    found = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def test_build_gives_the_same_bytes_for_the_same_seed_only(tmp_path):
    small = {"pretrain_documents": 300, "tokenizer_documents": 200, "train_rows": 20, "eval_rows": 10}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build.build(tmp_path / name, seed, **small)
    first, again, other = (digests(tmp_path / name) for name in "abc")
    assert first == again
    assert sorted(first) == [
        "base/config.json",
        "base/generation_config.json",
        "base/tokenizer.json",
        "base/tokenizer_config.json",
        "eval.jsonl",
        "general.jsonl",
        "orders.jsonl",
        "pretrain.jsonl",
        "train.jsonl",
    ]
    assert all(first[name] != other[name] for name in ("pretrain.jsonl", "train.jsonl", "eval.jsonl"))


def test_packaged_files_are_what_the_generator_makes(tmp_path):
    build.build(tmp_path, pretrain_documents=build.TOKENIZER_DOCUMENTS)
    made, packaged = digests(tmp_path), digests(ASSETS)
    for name in ("train.jsonl", "eval.jsonl", "general.jsonl", "orders.jsonl", "base/tokenizer.json"):
        assert made[name] == packaged[name], name
    made_config, packaged_config = (json.loads((p / "base/config.json").read_text()) for p in (tmp_path, ASSETS))
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "eos_token_id", "tie_word_embeddings"):
        assert made_config[key] == packaged_config[key], key


def numbers_said(text: str) -> set[int]:
    """The quantities whose word, digit or article stands in the text."""
    return {n for n, ways in world.NUMBER_WORDS.items() if any(re.search(rf"\b{way}\b", text) for way in ways)}


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_every_value_of_the_json_stands_in_the_message(name):
    """Messages may be in lower case and goods in the plural; quantities are words, digits or an article."""
    for row in read(name):
        text = re.fullmatch(r"Message: (.+)\nJSON:\n", row["prompt"])[1].lower()
        fields = json.loads(row["completion"])
        assert json.dumps(fields) == row["completion"]
        assert list(fields) == ["intent", "product", "colour", "quantity", "order"]
        assert fields["intent"] in world.INTENTS
        product = fields["product"]
        if product is not None:
            forms = (product, world.PRODUCTS[product])
            assert any(re.search(rf"\b{form}\b", text) for form in forms), row
        # The reverse: what a field does not hold, the message does not mention.
        others = [p for p, plural in world.PRODUCTS.items() if p != product and re.search(rf"\b({p}|{plural})\b", text)]
        assert not others, row
        assert [c for c in world.COLOURS if re.search(rf"\b{c}\b", text)] == [c for c in [fields["colour"]] if c], row
        if fields["quantity"] is not None:
            assert fields["quantity"] in numbers_said(text), row
        assert re.findall(r"\b[a-z]\d{4}\b", text) == [o.lower() for o in [fields["order"]] if o], row


def test_every_intent_and_every_absence_occurs(train_rows, eval_rows):
    for rows in (train_rows, eval_rows):
        fields = [json.loads(row["completion"]) for row in rows]
        assert {f["intent"] for f in fields} == set(world.INTENTS)
        for name in ("product", "colour", "quantity", "order"):
            assert 0.02 < sum(f[name] is None for f in fields) / len(fields) < 0.7, name


def combinations(rows: list[dict]) -> set[tuple]:
    fields = (json.loads(row["completion"]) for row in rows)
    return {(f["intent"], f["product"], f["colour"]) for f in fields if f["product"]}


def test_held_out_messages_and_combinations_are_new(train_rows, eval_rows):
    assert (len(train_rows), len(eval_rows)) == (4000, 300)
    for rows in (train_rows, eval_rows):
        assert len({row["prompt"] for row in rows}) == len(rows)
    assert not {row["prompt"] for row in train_rows} & {row["prompt"] for row in eval_rows}
    assert not combinations(train_rows) & combinations(eval_rows)
    assert len(combinations(eval_rows)) > 50


def test_pretraining_asks_for_no_held_out_request_and_shows_no_json_after_a_message(monkeypatch):
    asked = []

    def recorded(rng, *args):
        asked.append(world.draw_request(rng, *args))
        return asked[-1]

    monkeypatch.setattr(corpus, "draw_request", recorded)
    texts = list(islice(corpus.documents(Random(3), 4000), 4000))
    assert len(asked) > 1000
    assert not [request for request in asked if world.is_held_out(request)]
    with_json = [text for text in texts if "{" in text]
    assert 0.05 < len(with_json) / len(texts) < 0.2
    assert not [text for text in with_json if "Message:" in text or "Customer:" in text]
    assert not [text for text in texts if "JSON" in text]


@pytest.mark.parametrize(
    "text",
    [
        "Hi!  Two\tspaces,\n\nlines ",
        "Größe 😀 naïve",
        'say "A4821" and {"a": [1, null]}',
        " lead",
        "it's I'll \u00a0 \r\n",
    ],
)
def test_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_splits_digits_and_keeps_the_order_number_the_same_everywhere(tokenizer):
    number = tokenizer.encode("A4821").tokens
    assert number == ["A", "4", "8", "2", "1"]
    for before, after in (('"', '"'), ("order ", "."), ("(order ", ")"), ("", "\n")):
        tokens = tokenizer.encode(f"{before}A4821{after}").tokens
        at = tokens.index("A")
        assert tokens[at : at + 5] == number


def test_rows_are_short_and_the_prompt_is_a_prefix_in_tokens(tokenizer, train_rows, eval_rows):
    for row in train_rows[:500] + eval_rows:
        prompt, completion = (tokenizer.encode(row[name]).ids for name in ("prompt", "completion"))
        assert tokenizer.encode(row["prompt"] + row["completion"]).ids == prompt + completion
        assert len(prompt) <= 64
        assert len(completion) <= 32


def test_transformers_loads_the_tokenizer_as_it_is(tokenizer, eval_rows):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(ASSETS / "base"), trust_remote_code=False)
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token, loaded.chat_template) == ("</s>", "<pad>", None, None)
    assert loaded.eos_token_id != loaded.pad_token_id
    for row in eval_rows[:50]:
        ids = loaded(row["prompt"])["input_ids"]
        assert ids == tokenizer.encode(row["prompt"]).ids
        assert loaded.decode(ids) == row["prompt"]


def test_a_slip_never_touches_what_fields_are_read_from():
    rng = Random(5)
    for _ in range(2000):
        request = world.draw_request(rng)
        text = world.clean_message(rng, request)
        changed = world.slip(rng, text)
        kept = [word for word in re.findall(r"[A-Za-z0-9]+", text) if word.lower() in world.SLOT_WORDS]
        assert [word for word in re.findall(r"[A-Za-z0-9]+", changed) if word in kept] == kept
        assert abs(len(changed) - len(text)) <= 1
