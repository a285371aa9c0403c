"""Rows of pairs and of judged answers: every form they come in, what is trained of them, and what is refused."""

import json

import numpy as np
import pytest
from runs import home, write_jsonl  # noqa: F401

from jaxtune import data
from jaxtune.data.pairs import JudgedAssembler, PairAssembler, shared_prefix
from jaxtune.data.preferences import SIDES, JudgedForm, PairForm
from jaxtune.errors import UserError

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "five")))
PROMPT = "### User:\n2+2?\n\n### Assistant:\n"


@pytest.fixture(scope="module")
def tokenizer(home):  # noqa: F811
    return data.load_tokenizer(str(home / "model"))


def sharegpt(message):
    return {"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": message["content"]}


def read(tokenizer, path, rows, form, **more):
    settings = {"max_length": 200, "cache": False} | more
    return data.prepare(tokenizer, str(write_jsonl(path, rows)), labels=form, **settings)


def texts(tokenizer, rows, i=0):
    """(all of it, what is trained) of each side."""
    return [(tokenizer.decode(ids), tokenizer.decode(ids[mask > 0])) for ids, mask in (side[i] for side in rows.sides)]


CONVERSATIONS = {
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "answers as text": {"prompt": [USER], "chosen": "4", "rejected": "five"},
    "prompt as text": {"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]},
    "one message each": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "whole, implicit": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "whole, prompt too": {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "sharegpt": {"conversations": [sharegpt(USER)], "chosen": sharegpt(GOOD), "rejected": sharegpt(BAD)},
    "messages column": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
}


@pytest.mark.parametrize("row", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations(tokenizer, tmp_path, row):
    (rows,), _, report = read(tokenizer, tmp_path / "a.jsonl", [row], PairForm())
    assert texts(tokenizer, rows) == [(f"{PROMPT}{answer}</s>\n\n", f"{answer}</s>") for answer in ("4", "five")]
    assert shared_prefix(rows, 0) == len(PROMPT) and report.train_rows == 1


def asked(i):
    return {"role": "user", "content": f"{i % 25} + 1?"}


REPEATED = {
    "prompts": (PairForm(), lambda i: {"prompt": f"{i % 25} + 1 =", "chosen": f"{i}", "rejected": f"no {i}"}),
    "whole conversations": (PairForm(), lambda i: {s: [asked(i), GOOD | {"content": f"{s} {i}"}] for s in SIDES}),
    "texts that begin alike": (PairForm(), lambda i: {s: f"Q: {i % 25} + 1\nA: {s}, {i}" for s in SIDES}),
    "judged": (JudgedForm(), lambda i: {"prompt": f"{i % 25} + 1 =", "completion": f"{i}", "label": i % 2 > 0}),
    "judged messages": (
        JudgedForm(), lambda i: {"messages": [asked(i), GOOD | {"content": f"{i}"}], "label": i % 2 > 0}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("form", "row"), REPEATED.values(), ids=REPEATED)
def test_no_prompt_is_on_both_sides(tokenizer, tmp_path, form, row):
    (train,), held, report = read(tokenizer, tmp_path / "a.jsonl", [row(i) for i in range(75)], form, eval_fraction=0.2)
    prompts = [
        {tokenizer.decode(ids[: int(mask.argmax())]) for ids, mask in (rows[i] for i in range(len(rows)))}
        for rows in (train, held)
    ]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 25
    assert report.eval_rows == 15 and report.train_rows == 60


TEXTS = {
    "prompt": ({"prompt": "Q: 2+2\nA: ", "chosen": "4", "rejected": "five"}, "Q: 2+2\nA: ", "4", "five"),
    "prompt in both": (
        {"prompt": "Q: 2+2\nA:", "chosen": "Q: 2+2\nA: 4", "rejected": "Q: 2+2\nA: five"}, "Q: 2+2\nA:", " 4", " five"
    ),
    "implicit": ({"chosen": "so 2 + 2 is 4", "rejected": "so 2 + 2 is five"}, "so 2 + 2 is", " 4", " five"),
    "turns": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: to you", "rejected": "\n\nHuman: hi\n\nAssistant: to me"},
        "\n\nHuman: hi\n\nAssistant:", " to you", " to me",
    ),
    "instruction": (
        {"instruction": "Add.", "input": "2 2", "chosen": "4", "rejected": "five"}, "Add.\n\n2 2\n", "4", "five"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "chosen", "rejected"), TEXTS.values(), ids=TEXTS)
def test_texts(tokenizer, tmp_path, row, prompt, chosen, rejected):
    (rows,), _, _ = read(tokenizer, tmp_path / "a.jsonl", [row], PairForm())
    assert texts(tokenizer, rows) == [(f"{prompt}{a}</s>", f"{a}</s>") for a in (chosen, rejected)]


def test_an_answer_that_repeats_the_prompt_is_told(tokenizer, tmp_path):
    row = {"prompt": "2+2", "chosen": "2+2 is 4", "rejected": "five"}
    _, _, report = read(tokenizer, tmp_path / "a.jsonl", [row, row | {"chosen": "4"}], PairForm())
    assert any("one answer alone begins with the prompt, and keeps it: 1, first at" in line for line in report.lines())


def test_earlier_turns_are_not_trained(tokenizer, tmp_path):
    before = [USER, GOOD, {"role": "user", "content": "sure?"}]
    row = {"chosen": [*before, GOOD], "rejected": [*before, BAD]}
    (rows,), _, _ = read(tokenizer, tmp_path / "a.jsonl", [row], PairForm())
    assert [trained for _, trained in texts(tokenizer, rows)] == ["4</s>", "five</s>"]
    judged = {"messages": [*before, GOOD], "label": True}
    (rows,), _, _ = read(tokenizer, tmp_path / "b.jsonl", [judged, judged | {"label": False}], JudgedForm())
    assert texts(tokenizer, rows)[0][1] == "4</s>"


def test_margins(tokenizer, tmp_path):
    row = TEXTS["prompt"][0]
    for more, margin in (({"margin": 1.5}, 1.5), ({"chosen_score": 3, "rejected_score": 1}, 2.0), ({}, 0.0)):
        (rows,), _, report = read(tokenizer, tmp_path / "a.jsonl", [row | more], PairForm(margins=True))
        assert rows.target.tolist() == [[margin]]
    (rows,), _, report = read(tokenizer, tmp_path / "a.jsonl", [row | {"margin": 1.5}], PairForm())
    assert rows.target.tolist() == [[0.0]] and "margin" in report.lines()[1]


def test_columns_are_mapped(tokenizer, tmp_path):
    row = {"question": "2+2 ", "better": "4", "worse": "five"}
    form = PairForm(columns={"prompt": "question", "chosen": "better", "rejected": "worse"})
    (rows,), _, _ = read(tokenizer, tmp_path / "a.jsonl", [row], form)
    assert texts(tokenizer, rows)[1] == ("2+2 five</s>", "five</s>")


PAIR = TEXTS["prompt"][0]
REFUSED = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, {}, "no column 'rejected'"),
    "judged rows": ({"prompt": "a", "completion": "b", "label": True}, {}, "objective.name=kto"),
    "one column twice": (PAIR, {"columns": {"chosen": "chosen", "rejected": "chosen"}}, "name two columns"),
    "equal answers": (PAIR | {"rejected": "4"}, {}, "the two answers of every pair are equal"),
    "no prompt": ({"chosen": "4", "rejected": "five"}, {}, "no prompt"),
    "no prompt of messages": ({"chosen": [GOOD], "rejected": [BAD]}, {}, "no prompt"),
    "another conversation": (
        {"prompt": "2+3?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, {}, "does not begin with the prompt"
    ),
    "another conversation as text": (
        {"prompt": "Human: hi", "chosen": "Human: 2+2?\n\nAssistant: 4", "rejected": "Human: 2+2?\n\nAssistant: 5"},
        {}, "do not begin with the prompt 'Human: hi'",
    ),
    "no answer": ({"prompt": [USER], "chosen": [USER], "rejected": [USER, BAD]}, {}, "no answer of the assistant"),
    "null": (PAIR | {"chosen": None}, {}, "'chosen' is null"),
    "a number for messages": ({"prompt": [USER], "chosen": 4, "rejected": [BAD]}, {}, "expected text or messages"),
    "too long": (PAIR | {"chosen": "4" * 300}, {}, "every row is over data.max_length"),
    "an image": (PAIR | {"images": ["a.png"]}, {}, "would change what is trained"),
    "two prompts": (PAIR | {"instruction": "a"}, {}, "data.ignore"),
    "margin": (PAIR | {"margin": "much"}, {"margins": True}, "expected a number"),
    "endless margin": (PAIR | {"margin": "inf"}, {"margins": True}, "expected a finite number"),
    "unknown column": (PAIR, {"columns": {"choosen": "chosen"}}, "Did you mean"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "settings", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_pair_is_refused(tokenizer, tmp_path, row, settings, said):
    with pytest.raises(UserError, match=said):
        read(tokenizer, tmp_path / "a.jsonl", [row], PairForm(**settings))


def test_equal_pairs_are_left_out(tokenizer, tmp_path):
    (rows,), _, report = read(tokenizer, tmp_path / "a.jsonl", [PAIR, PAIR | {"chosen": "five"}], PairForm())
    assert len(rows) == 1 and "1 pairs of two equal answers" in report.lines()[0]


def test_truncation_keeps_the_pair(tokenizer, tmp_path):
    long = PAIR | {"rejected": "five" * 20}
    (rows,), _, _ = read(tokenizer, tmp_path / "a.jsonl", [long], PairForm(), max_length=40, overlength="truncate")
    assert [len(side[0][0]) for side in rows.sides] == [12, 40]
    with pytest.raises(UserError, match="no trained token is left"):
        read(tokenizer, tmp_path / "a.jsonl", [PAIR], PairForm(), max_length=8, overlength="truncate")


JUDGED = [
    {"prompt": f"{i} and {i} make ", "completion": f"{2 * i}" if good else "no", "label": good}
    for i in range(10, 14)
    for good in (True, False)
]


def test_judged_answers(tokenizer, tmp_path):
    (rows,), _, report = read(tokenizer, tmp_path / "a.jsonl", JUDGED, JudgedForm())
    assert rows.target[:, 0].tolist() == [1, 0] * 4 and report.lines()[0].count("8 kept")
    whole, trained = texts(tokenizer, rows, 3)[1]
    assert whole == "11 and 11 make 22</s>" and trained == "22</s>"  # the answer of row 2
    assert texts(tokenizer, rows, 0)[1][1] == "no</s>"  # of the last


@pytest.mark.parametrize("label", [(1, 0), ("true", "False"), (1.0, 0.0), (True, False)])
def test_verdicts(tokenizer, tmp_path, label):
    given = [row | {"label": label[not row["label"]]} for row in JUDGED]
    (rows,), _, _ = read(tokenizer, tmp_path / "a.jsonl", given, JudgedForm())
    assert rows.target[:, 0].tolist() == [1, 0] * 4


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row | {"label": True} for row in JUDGED], "nothing to set them against"),
        ([row | {"label": 0.5} for row in JUDGED], "expected true for a good answer"),
        ([{"prompt": "a", "completion": "b"}], "no column 'label'"),
        ([PAIR], "objective.name=preference"),
        ([{"text": "a", "label": True}], "sequence_classification"),
    ],
)
def test_what_is_not_judged_is_refused(tokenizer, tmp_path, rows, said):
    with pytest.raises(UserError, match=said):
        read(tokenizer, tmp_path / "a.jsonl", rows, JudgedForm())


def test_batches_hold_pairs(tokenizer, tmp_path):
    pairs = [{"prompt": f"{i} is ", "chosen": str(i), "rejected": "no"} for i in range(20)]
    (rows,), held, _ = read(tokenizer, tmp_path / "a.jsonl", pairs, PairForm(), eval_fraction=0.2)
    assert len(rows) == len(rows.other) == 16 and len(held) == 4
    batches = data.Batches([rows], batch_size=4, grad_accum=2, max_length=64, assembler=PairAssembler)
    batch = batches.batch(1)
    assert batch["tokens"].shape[:3] == (2, 2, 2) and batch["weights"].sum() == 4
    for a, b in np.ndindex(2, 2):
        told = [tokenizer.decode(batch["tokens"][a, b, s][batch["segments"][a, b, s] > 0]) for s in (0, 1)]
        number, _, answer = told[0].removesuffix("</s>").partition(" is ")
        assert answer == number and told[1] == f"{number} is no</s>"
        marked = [batch["targets"][a, b, s][batch["answer"][a, b, s] > 0].tolist() for s in (0, 1)]
        assert [tokenizer.decode(ids) for ids in marked] == [f"{number}</s>", "no</s>"]


def test_judged_batches_hold_both(tokenizer, tmp_path):
    (rows,), _, _ = read(tokenizer, tmp_path / "a.jsonl", JUDGED, JudgedForm())
    laid = JudgedAssembler([rows], 4, 1, 64, False)
    laid.reference = np.arange(16, dtype=np.float32).reshape(2, 8)
    batch = laid.assemble([[0], [1], [5]])
    assert batch["good"].tolist() == [[1, 0, 0, 0]] and batch["weights"].tolist() == [[1, 1, 1, 0]]
    assert batch["reference"][0].tolist() == [[0, 8], [1, 9], [5, 13], [0, 0]]


def test_rows_of_pairs_come_from_the_cache(tokenizer, tmp_path):
    form, path = PairForm(margins=True), tmp_path / "a.jsonl"
    first, again = (
        read(tokenizer, path, [PAIR | {"margin": 2}], form, cache=True, cache_dir=tmp_path / "cache") for _ in range(2)
    )
    assert again[2].sources[0].cached and texts(tokenizer, again[0][0]) == texts(tokenizer, first[0][0])
    assert again[0][0].target.tolist() == [[2.0]]


def test_real_pairs(tokenizer, assets):
    for form, file in ((PairForm(), "dpo_en_demo.json"), (JudgedForm(), "kto_en_demo.json")):
        path = assets / "data" / "preference" / file
        (rows,), _, _ = data.prepare(tokenizer, str(path), labels=form, max_length=20_000, cache=False)
        assert len(rows) == 300 and json.loads(path.read_text())[0]
        shown = form.render(rows, tokenizer)
        assert shown.count("⟦") >= 2 and "trained" in shown
