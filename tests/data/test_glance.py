"""What training says of its data from tokens alone, against what `jaxtune data` finds in the texts."""

import json

import numpy as np
import pytest
from data_zoo import CHATML, byte_tokenizer, write_jsonl

from jaxtune import curate, data
from jaxtune.curate.training import token_hashes
from jaxtune.data.labels import LabelForm

TOKENIZER = byte_tokenizer()


def pairs(n, first=0):
    return [{"prompt": f"question {i}", "completion": f"answer {i * i}"} for i in range(first, first + n)]


def glance(tmp_path, rows, held=None, tokenizer=TOKENIZER, form=None, **settings):
    """(report of the glance, report of `examine`)."""
    names = {"train": write_jsonl(tmp_path / "train.jsonl", rows)}
    names["eval"] = write_jsonl(tmp_path / "eval.jsonl", held) if held else None
    settings = {"max_length": 64} | settings
    train, held_out, report = data.prepare(tokenizer, **names, labels=form, cache=False, **settings)
    examined = curate.examine(tokenizer, **names, labels=form, near=0, **settings)
    return curate.glance(tokenizer, train, held_out, report, form), examined


def checks(report):
    return {f.check: (f.count, f.rows) for f in report.findings}


def test_nothing_is_found_in_good_rows(tmp_path):
    seen, _ = glance(tmp_path, pairs(40), pairs(8, 100))
    assert seen.findings == []
    assert seen.summary["rows"] == seen.summary["rows_trained"] == 40 and seen.summary["eval_rows"] == 8
    assert seen.summary["sources"][1]["split"] == "eval"
    text = "".join(piece for piece, _ in seen.samples[0][1])
    assert seen.samples[0][0].endswith("train.jsonl:1") and text == "question 0\nanswer 0</s>"
    assert [piece for piece, trained in seen.samples[0][1] if trained] == ["answer 0</s>"]


def test_it_finds_what_the_texts_show(tmp_path):
    rows = pairs(40)
    rows += [rows[3], {"prompt": "question 5", "completion": "another"}]
    held = [*pairs(6, 100), rows[7], {"prompt": "question 9", "completion": "mine"}]
    seen, examined = glance(tmp_path, rows, held)
    found, want = checks(seen), checks(examined)
    assert set(found) == {"duplicates", "conflicts", "overlap"}
    for check, value in found.items():
        assert value == want[check], check
    for fact in ("rows", "rows_trained", "eval_rows", "tokens", "trained_tokens", "over_limit", "lengths"):
        assert seen.summary[fact] == examined.summary[fact], fact


def test_what_was_left_out_is_said(tmp_path):
    rows = [*pairs(40), {"prompt": "q" * 90, "completion": "a"}]
    seen, _ = glance(tmp_path, rows)
    [finding] = seen.findings
    assert finding.check == "max_length" and "1 row (2.4%)" in finding.message and "the longest has" in finding.message


def test_pieces_of_a_row_are_no_copies(tmp_path):
    rows = [{"text": f"{i} " + "so it goes " * 20} for i in range(5)]
    seen, _ = glance(tmp_path, rows, overlength="split")
    assert {f.check for f in seen.findings} == {"max_length"}


def test_texts_have_no_prompt_in_common(tmp_path):
    """A start token stands before each of them."""
    seen, _ = glance(tmp_path, [{"text": f"text {i}"} for i in range(30)], tokenizer=byte_tokenizer(bos="<s>"))
    assert seen.findings == []


def test_conversations(tmp_path):
    def chat(i, answer):
        return {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": answer}]}

    rows = [*(chat(i, f"say {i}") for i in range(30)), chat(4, "say no")]
    seen, examined = glance(tmp_path, rows, tokenizer=byte_tokenizer(CHATML, eos="<|im_end|>"), max_length=200)
    assert set(checks(seen)) == {"conflicts"} and checks(seen)["conflicts"] == checks(examined)["conflicts"]


def test_answers_that_are_classes_are_counted(tmp_path):
    rows = [{"prompt": f"message {i}", "completion": "spam" if i % 20 == 0 else "ham"} for i in range(100)]
    seen, examined = glance(tmp_path, rows)
    assert seen.summary["groups"]["label"] == [{"value": "ham", "rows": 95}, {"value": "spam", "rows": 5}]
    assert [f.message for f in seen.findings] == [f.message for f in examined.findings if f.check == "class_balance"]


@pytest.mark.parametrize("per_token", [False, True])
def test_labels(tmp_path, per_token):
    if per_token:
        form = LabelForm(per_token=True, names=("O", "B-x", "B-y"), columns={})
        rows = [{"tokens": ["a", str(i), "b"], "labels": ["O", "B-x", "O"]} for i in range(24)]
        rows += [{"tokens": ["a", "3", "b"], "labels": ["O", "B-y", "O"]}]
        classes = {"B-x": 24, "B-y": 1}
    else:
        form = LabelForm(per_token=False, names=("ham", "spam"), columns={})
        rows = [{"text": f"text {i}", "label": "ham"} for i in range(24)] + [{"text": "text 3", "label": "spam"}]
        classes = {"ham": 24, "spam": 1}
    seen, examined = glance(tmp_path, rows, form=form)
    assert {f.check for f in seen.findings} == {"conflicts", "class_balance"}
    assert checks(seen) == {name: value for name, value in checks(examined).items() if name in checks(seen)}
    for report, column in ((seen, "label"), (examined, "answer")):
        assert {g["value"]: g["rows"] for g in report.summary["groups"][column]} == classes
    json.dumps(seen.as_json())


def test_hashes_depend_on_tokens_order_and_side(monkeypatch):
    """Whatever is hashed together: rows of one chunk, or each in a chunk of its own."""
    tokens, length = np.array([1, 2, 3, 2, 1, 3, 1, 2, 3, 9, 1, 2], np.int32), np.array([3, 3, 3, 1, 2], np.int32)
    rows = data.Rows(
        tokens=tokens,
        mask=np.array([0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1], np.uint8),
        start=np.cumsum(length) - length,
        length=length,
        origin=np.arange(5),
        source=np.zeros(5, np.int32),
        digest=np.zeros(5, np.uint64),
        labels=("a",),
    )
    whole = [token_hashes(rows, side) for side in (None, 0, 1)]
    assert whole[0][0] == whole[0][2] != whole[0][1], "order counts"
    assert whole[2][0] != whole[2][2], "the side counts: 2 3 and 3"
    assert (whole[1] != 0).tolist() == [True, True, True, True, False] and whole[2][3] == 0
    assert whole[2][4] == token_hashes(rows.select(np.array([4])), None)[0]
    monkeypatch.setattr("jaxtune.curate.training.AT_ONCE", 1)
    assert all(np.array_equal(token_hashes(rows, side), want) for side, want in zip((None, 0, 1), whole))
