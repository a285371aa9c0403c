"""Text to tokens, the cache, lengths and the whole of `prepare`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_zoo import CHATML, byte_tokenizer, space_tokenizer, trained_runs, write_jsonl

from jaxtune import files
from jaxtune.data import Batches, load_tokenizer, prepare, render_plain, render_rows
from jaxtune.data import cache as cache_module
from jaxtune.data.formats import Document
from jaxtune.data.tokenize import Encoder
from jaxtune.data.tokenizer import tokenizer_digest
from jaxtune.errors import UserError

PAIRS = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture(scope="module")
def tokenizers(assets):
    """The real ones, by name."""
    paths = {"qwen3": "tokenizers/qwen3", "gpt2": "tokenizers/gpt2", "stories260k": "models/stories260k"}
    return {name: load_tokenizer(str(assets / path)) for name, path in paths.items()}


def encode(tokenizer, *pieces):
    [(ids, mask)] = Encoder(tokenizer).encode(["a.jsonl:1"], [Document(pieces)])
    return ids, mask


# Text


@pytest.mark.parametrize("make", [byte_tokenizer, space_tokenizer])
def test_bos_once_eos_trained_and_the_prompt_a_prefix(make):
    tokenizer = make(bos="<s>")
    ids, mask = encode(tokenizer, ("Q:\n", False), ("word two", True))
    assert ids[: len(tokenizer("Q:\n").input_ids)] == tokenizer("Q:\n").input_ids
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1
    assert trained_runs(tokenizer, ids, mask) == ["word two</s>"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "Q:\nword two"


def test_a_completion_gets_no_space_before_it_that_is_not_there():
    tokenizer = space_tokenizer(bos="<s>")
    spaced, bare = (encode(tokenizer, ("Q:\n", False), (answer, True)) for answer in (" a", "a"))
    assert len(spaced[0]) == len(bare[0]) + 1
    assert tokenizer.convert_ids_to_tokens(bare[0])[-2:] == ["a", "</s>"]
    assert tokenizer.convert_ids_to_tokens(spaced[0])[-3:] == ["▁", "a", "</s>"]


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "stories260k"])
@pytest.mark.parametrize("answer", ["Natalia", " Natalia", "\nNatalia", "\n\nNo", "12/60 = <<2>>", "é 🦙 ok", "  x"])
def test_real_tokenizers_keep_the_text_and_the_prompt(tokenizers, name, answer):
    tokenizer = tokenizers[name]
    prompt = "How many? é\n"
    ids, mask = encode(tokenizer, (prompt, False), (answer, True))
    start = tokenizer(prompt).input_ids
    assert ids[: len(start)] == start and not any(mask[: len(start)]) and all(mask[len(start) :])
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1], skip_special_tokens=True) == prompt + answer
    whole = tokenizer.decode(ids[:-1])
    assert whole.count("<s>") == (name == "stories260k")


def test_a_prompt_whose_last_token_would_merge_with_the_completion(tokenizers):
    """gpt2 has one token for " question": tokenised together, the prompt would not be a prefix."""
    tokenizer = tokenizers["gpt2"]
    joined = tokenizer("The quest" + "ion").input_ids
    ids, mask = encode(tokenizer, ("The quest", False), ("ion", True))
    assert ids[:-1] != joined  # else this test shows nothing
    assert tokenizer.decode(ids[:-1]) == "The question"
    assert trained_runs(tokenizer, ids, mask) == ["ion<|endoftext|>"]


def test_pad_that_is_eos_leaves_the_real_eos_trained(tokenizers):
    tokenizer = tokenizers["gpt2"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id
    ids, mask = encode(tokenizer, ("Q\n", False), ("A", True))
    assert (ids[-1], mask[-1]) == (tokenizer.eos_token_id, 1)


def test_special_tokens_in_the_text_are_not_doubled():
    tokenizer = space_tokenizer(bos="<s>")
    ids, mask = encode(tokenizer, ("<s>Q\n", False), ("A</s>", True))
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1
    assert mask[-1] == 1


def test_truncation_in_the_tokenizer_file_does_not_act():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    ids, _ = encode(tokenizer, ("abcdefgh", True))
    assert tokenizer.decode(ids) == "abcdefgh</s>"


def test_no_eos_is_refused():
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode(byte_tokenizer(eos=None), ("x", True))


def test_half_a_character_names_the_row():
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*half a character"):
        encode(byte_tokenizer(), ("abc\ud83d", True))


# Rows through prepare


def one(tmp_path, rows, tokenizer=None, **kwargs):
    kwargs = {"max_length": 64, **kwargs}
    train, held_out, report = prepare(tokenizer or byte_tokenizer(), write_jsonl(tmp_path / "a.jsonl", rows), **kwargs)
    return train[0], held_out, report


def test_pairs_are_a_chat_where_the_tokenizer_has_a_template(tmp_path):
    plain, chat = byte_tokenizer(), byte_tokenizer(CHATML, eos="<|im_end|>")
    kwargs = {"max_length": 200}
    texts = []
    for tokenizer, more in ((plain, {}), (chat, {}), (chat, {"chat": False}), (plain, {"chat": True})):
        rows, _, _ = one(tmp_path, PAIRS[:1], tokenizer, **kwargs, **more)
        texts.append(tokenizer.decode(rows[0][0]))
    assert texts == [
        "Question 0?\nAnswer 0.</s>",
        "<|im_start|>user\nQuestion 0?<|im_end|>\n<|im_start|>assistant\nAnswer 0.<|im_end|>\n",
        "Question 0?\nAnswer 0.<|im_end|>",
        "### User:\nQuestion 0?\n\n### Assistant:\nAnswer 0.</s>\n\n",
    ]


def test_too_long_is_dropped_counted_and_said(tmp_path):
    rows, _, report = one(tmp_path, [{"text": "x" * n} for n in (5, 30, 9, 31)], max_length=30)
    assert [len(rows[i][0]) for i in range(len(rows))] == [6, 10]
    assert report.lines() == [
        f"{tmp_path}/a.jsonl (text): 4 rows: 2 kept, 2 over 30 tokens dropped, 0 without a trained token dropped; "
        "16 tokens, 14 (88%) trained"
    ]
    assert [rows.where(i) for i in range(2)] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3"]


def test_truncation_drops_rows_whose_completion_is_cut_away(tmp_path):
    pairs = [{"prompt": "p" * n, "completion": "abc"} for n in (3, 8, 50)]
    rows, _, report = one(tmp_path, pairs, max_length=10, overlength="truncate")
    assert [trained_runs(byte_tokenizer(), *rows[i]) for i in range(len(rows))] == [["abc</s>"], ["a"]]
    assert (report.sources[0].too_long, report.sources[0].untrained, report.sources[0].kept) == (2, 1, 2)


def test_split_predicts_every_token_but_the_first_once(tmp_path):
    text = "abcdefghijklmnopqrstuvwxyz"
    tokenizer = byte_tokenizer()
    rows, _, report = one(tmp_path, [{"text": text}, {"text": "short"}], tokenizer, max_length=10, overlength="split")
    assert rows.length.max() <= 10 and report.sources[0].too_long == 1
    batches = Batches([rows], batch_size=len(rows), max_length=10)
    batch = batches.batch(0)
    predicted = batch["targets"][batch["weights"] > 0]
    whole = [t for row in (text, "short") for t in [*tokenizer(row).input_ids, tokenizer.eos_token_id][1:]]
    assert sorted(predicted.tolist()) == sorted(whole)


def test_split_drops_the_pieces_without_a_trained_token(tmp_path):
    rows, _, report = one(tmp_path, [{"prompt": "p" * 40, "completion": "abc"}], max_length=12, overlength="split")
    assert [trained_runs(byte_tokenizer(), *rows[i]) for i in range(len(rows))] == [["abc</s>"]]
    assert report.sources[0].untrained == 3


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        (
            [{"text": "x" * 99}],
            {"max_length": 20},
            r"none of its 1 rows .* over data.max_length=20 tokens \(the longest has 100\)",
        ),
        (
            [{"prompt": "p" * 99, "completion": "a"}],
            {"max_length": 20, "overlength": "truncate"},
            r"set data.overlength=split",
        ),
        ([{"messages": [{"role": "user", "content": "x"}]}], {}, "no conversation has an assistant's turn"),
        ([{"prompt": "x", "completion": ""}], {}, "the completions are empty"),
        ([{"text": "x"}], {"overlength": "cut"}, "data.overlength: unknown 'cut'"),
        ([{"text": "x"}], {"max_length": 1}, "data.max_length: 1 leaves no token"),
        ([{"text": "x"}], {"eval_fraction": 1.5}, "data.eval_fraction"),
        ([{"text": "x"}, {"text": "x"}], {"eval_fraction": 0.5}, "without training rows"),
        ([{"text": "x"}], {"eval_fraction": 0.5, "eval": "b.jsonl"}, "not both"),
        ([{"text": "x"}, {"text": 3}], {}, r"a\.jsonl:2: column 'text' is a number \(3\), but text"),
        ([{"text": "x"}], {"vocab_size": 100}, r"larger than the model's embedding \(100 rows\)"),
    ],
)
def test_data_that_cannot_be_trained_on(tmp_path, rows, kwargs, message):
    with pytest.raises(UserError, match=message):
        one(tmp_path, rows, **kwargs)


def test_rows_without_a_trained_token_are_dropped_and_counted(tmp_path):
    rows, _, report = one(tmp_path, [*PAIRS[:3], {"prompt": "x", "completion": ""}])
    assert len(rows) == 3 and report.sources[0].untrained == 1


def test_a_vocabulary_padded_beyond_the_tokenizer_is_fine(tmp_path):
    tokenizer = byte_tokenizer()
    rows, _, _ = one(tmp_path, PAIRS, tokenizer, vocab_size=len(tokenizer) + 100)
    assert len(rows) == 40


# Evaluation rows


def places(rows):
    return {rows.where(i).rpartition(":")[2] for i in range(len(rows))}


def test_the_held_out_rows_do_not_depend_on_order_and_duplicates_stay_together(tmp_path):
    doubled = [*PAIRS, *({**row, "id": i} for i, row in enumerate(PAIRS[::-1]))]
    train, held_out, report = one(tmp_path, doubled, eval_fraction=0.2)
    texts = [{bytes(rows[i][0]) for i in range(len(rows))} for rows in (train, held_out)]
    assert not texts[0] & texts[1] and len(held_out) == 16 and report.eval_rows == 16
    _, again, _ = one(tmp_path, doubled[::-1], eval_fraction=0.2)
    assert {bytes(again[i][0]) for i in range(len(again))} == texts[1]
    _, other_tokenizer, _ = one(tmp_path, doubled, space_tokenizer(), eval_fraction=0.2)
    assert places(other_tokenizer) == places(held_out)
    _, smallest, _ = one(tmp_path, PAIRS, eval_fraction=0.001)
    assert len(smallest) == 1


def test_several_sources_and_an_evaluation_file(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", PAIRS[:5]), write_jsonl(tmp_path / "b.jsonl", [{"text": "free"}])
    c = write_jsonl(tmp_path / "c.jsonl", PAIRS[5:8])
    for train in (f"{a}, {b}", (a, b)):
        rows, held_out, report = prepare(byte_tokenizer(), train, eval=f"{c},{b}", max_length=64)
        assert [len(r) for r in rows] == [5, 1] and [r.format for r in report.sources] == ["prompt_completion", "text"]
        assert [held_out.where(i) for i in range(4)] == [f"{c}:1", f"{c}:2", f"{c}:3", f"{b}:1"]
        assert byte_tokenizer().decode(held_out[3][0]) == "free</s>"
    with pytest.raises(UserError, match="no source given"):
        prepare(byte_tokenizer(), " , ", max_length=64)


# The cache


def test_the_second_time_comes_from_the_cache_and_is_equal(tmp_path, cache, monkeypatch):
    first, _, report = one(tmp_path, PAIRS)
    assert not report.sources[0].cached and len(list(cache.iterdir())) == 1
    monkeypatch.setattr(Encoder, "encode", None)  # nothing is tokenised any more
    second, _, again = one(tmp_path, PAIRS)
    assert again.sources[0].cached and again.fingerprint == report.fingerprint
    assert np.array_equal(first.tokens, second.tokens) and np.array_equal(first.mask, second.mask)
    shorter, _, _ = one(tmp_path, PAIRS, max_length=23)  # another length needs no new tokens
    assert len(shorter) == 10
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert prepare(byte_tokenizer(), str(copy), max_length=64)[2].sources[0].cached


def test_no_cache_leaves_nothing_behind(tmp_path, cache):
    kept, _, report = one(tmp_path, PAIRS)
    bare, _, again = one(tmp_path, PAIRS, cache=False, cache_dir=tmp_path / "other")
    assert not again.sources[0].cached and not (tmp_path / "other").exists()
    assert np.array_equal(kept.tokens, bare.tokens) and again.fingerprint == report.fingerprint


def test_whatever_decides_the_tokens_decides_the_key(tmp_path, cache):
    seen = set()
    bos = byte_tokenizer(bos="<s>")
    longer = byte_tokenizer()
    longer.add_tokens(["Question"])
    for tokenizer, rows, kwargs in [
        (None, PAIRS, {}),
        (None, PAIRS[1:], {}),
        (None, PAIRS, {"system": "Be kind."}),
        (None, PAIRS, {"chat": True}),
        (None, PAIRS, {"template": "{prompt} {completion}"}),
        (None, PAIRS, {"columns": {"prompt": "completion", "completion": "prompt"}}),
        (bos, PAIRS, {}),
        (longer, PAIRS, {}),
        (byte_tokenizer(eos="<|im_end|>"), PAIRS, {}),
        (byte_tokenizer(CHATML), PAIRS, {}),
    ]:
        _, _, report = one(tmp_path, rows, tokenizer, max_length=200, **kwargs)
        assert not report.sources[0].cached
        seen.add(report.fingerprint)
    assert len(seen) == len(list(cache.iterdir())) == 10


def test_the_fingerprint_follows_all_that_changes_a_batch(tmp_path):
    base = one(tmp_path, PAIRS)[2].fingerprint
    others = [
        one(tmp_path, PAIRS, **kwargs)[2].fingerprint
        for kwargs in ({"max_length": 30}, {"overlength": "split"}, {"eval_fraction": 0.1})
    ]
    assert len({base, *others}) == 4
    assert one(tmp_path, PAIRS)[2].fingerprint == base


def test_a_failure_leaves_no_half_written_cache(tmp_path, cache):
    with pytest.raises(UserError, match=r"a\.jsonl:41: malformed"):
        path = tmp_path / "a.jsonl"
        write_jsonl(path, PAIRS)
        path.write_text(path.read_text() + "{\n")
        prepare(byte_tokenizer(), str(path), max_length=64)
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_told_in_one_message(tmp_path, cache, monkeypatch):
    def full(*files):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_fsync", full)
    with pytest.raises(UserError, match=r"token cache: No room is left on the disk.*Set JAXTUNE_CACHE"):
        one(tmp_path, PAIRS)
    assert list(cache.iterdir()) == []


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "rows.npy", "said.json", "checksums.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_damaged_tokens_are_made_again_and_it_is_said_once(name, damage, tmp_path, cache):
    first, _, _ = one(tmp_path, PAIRS)
    whole = {p.name: p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    first = np.array(first.tokens)
    damage(next(cache.iterdir()) / name)
    rows, _, report = one(tmp_path, PAIRS)
    said = [line for line in report.lines() if "were damaged" in line]
    assert len(said) == ((name, damage) != ("checksums.json", Path.unlink))  # then it is a cache of before
    assert np.array_equal(rows.tokens, first)
    assert whole == {p.name: p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    again = one(tmp_path, PAIRS)[2]
    assert again.sources[0].cached and not any("were damaged" in line for line in again.lines())


@pytest.mark.parametrize("closed", ["read", "write"])
def test_a_cache_of_another_user_is_done_without(closed, tmp_path, cache, monkeypatch):
    first, _, report = one(tmp_path, PAIRS)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(cache))

    if closed == "read":
        monkeypatch.setattr(cache_module, "hash_of", refuse)
    else:
        shutil.rmtree(next(cache.iterdir()))
        monkeypatch.setattr(files.os, "mkdir", refuse)
    rows, _, again = one(tmp_path, PAIRS)
    assert np.array_equal(first.tokens, rows.tokens) and again.fingerprint == report.fingerprint
    assert [line for line in again.lines() if "belongs to another user" in line and "JAXTUNE_CACHE" in line]


def test_other_users_can_read_what_is_cached(tmp_path, cache):
    mask = os.umask(0o022)
    one(tmp_path, PAIRS)
    os.umask(mask)
    assert {oct(p.stat().st_mode & 0o777) for p in cache.rglob("*")} == {"0o755", "0o644"}


def test_tokenizers_that_differ_have_other_digests():
    digests = {
        tokenizer_digest(t)
        for t in (byte_tokenizer(), space_tokenizer(), byte_tokenizer(CHATML), byte_tokenizer(bos="<s>"))
    }
    assert len(digests) == 4 and tokenizer_digest(byte_tokenizer()) in digests


# Tokenizers from disk


def test_load_tokenizer(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tok")
    (tmp_path / "chat.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(str(tmp_path / "tok"), str(tmp_path / "chat.jinja"))
    assert tokenizer.chat_template == CHATML and tokenizer("é").input_ids == byte_tokenizer()("é").input_ids
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(str(tmp_path / "tok"), str(tmp_path / "none.jinja"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer here"):
        load_tokenizer(str(tmp_path / "empty"))
    (tmp_path / "tok" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        load_tokenizer(str(tmp_path / "tok"))


# Preview


@pytest.mark.parametrize("make", [byte_tokenizer, space_tokenizer])
def test_the_preview_marks_what_is_trained(tmp_path, make):
    tokenizer = make(bos="<s>")
    rows, _, _ = one(tmp_path, [{"prompt": "Q é", "completion": "A b"}, {"text": "x"}][:1], tokenizer)
    shown = render_plain(rows, tokenizer)
    heading, text = shown.split("\n", 1)
    assert heading == f"{tmp_path}/a.jsonl:1: {len(rows[0][0])} tokens, 4 trained"
    assert text.replace("<s> ", "<s>") == "<s>Q é\n⟦A b</s>⟧\n"
    colours = render_rows(rows, tokenizer)
    assert [colours.plain[s.start : s.end] for s in colours.spans if s.style == "green"] == ["A b</s>"]


# Real data


@pytest.mark.parametrize("name", ["qwen3", "stories260k"])
def test_gsm8k(assets, tokenizers, name, tmp_path):
    lines = (assets / "data" / "gsm8k" / "train.jsonl").read_text().splitlines()[:300]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("\n".join(lines))
    columns = {"prompt": "question", "completion": "answer"}
    [rows], held_out, report = prepare(
        tokenizers[name], str(path), columns=columns, eval_fraction=0.1, max_length=512, vocab_size=151936
    )
    assert report.sources[0].rows == 300 and len(rows) + len(held_out) == report.sources[0].kept
    for i in (0, len(rows) - 1):
        row = json.loads(lines[int(rows.origin[i]) - 1])
        [run] = trained_runs(tokenizers[name], *rows[i])
        end = {"qwen3": "<|im_end|>", "stories260k": "</s>"}[name]
        assert run.removeprefix("<think>\n\n</think>\n\n") == row["answer"] + end


@pytest.mark.parametrize("name", ["qwen3", "stories260k"])
def test_wikisql_and_toolcalls(assets, tokenizers, name):
    tokenizer = tokenizers[name]
    [rows], _, report = prepare(
        tokenizer, str(assets / "data" / "wikisql" / "test.jsonl"), completion_from="\nA:", max_length=1024
    )
    assert report.sources[0].format == "text" and len(rows) == 100
    assert all(trained_runs(tokenizer, *rows[i])[0].lstrip().startswith("SELECT") for i in range(100))
    [rows], _, report = prepare(
        tokenizer, str(assets / "data" / "toolcall" / "glaive_toolcall_en_demo.json"), max_length=4096
    )
    assert report.sources[0].format == "sharegpt" and report.sources[0].untrained == 0
    end = {"qwen3": "<|im_end|>", "stories260k": "</s>"}[name]
    source = json.loads((assets / "data" / "toolcall" / "glaive_toolcall_en_demo.json").read_text())
    for i in range(0, len(rows), 10):
        turns = [m for m in source[int(rows.origin[i]) - 1]["conversations"] if m["from"] in ("gpt", "function_call")]
        runs = trained_runs(tokenizer, *rows[i])
        assert len(runs) == len(turns) and all(run.endswith(end) for run in runs)
        for run, turn in zip(runs, turns):
            wanted = turn["value"] if turn["from"] == "gpt" else json.loads(turn["value"])["name"]
            assert wanted.strip() in run


def test_data_code_needs_no_jax(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    byte_tokenizer().save_pretrained(tmp_path / "tok")
    code = (
        "import sys\nfrom jaxtune import data\nassert not {'jax', 'transformers', 'datasets'} & set(sys.modules)\n"
        f"rows, _, _ = data.prepare(data.load_tokenizer({str(tmp_path / 'tok')!r}), {path!r}, max_length=64)\n"
        "data.Batches(rows, batch_size=4, max_length=64).batch(0)\n"
        "print(sorted({'jax', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"
