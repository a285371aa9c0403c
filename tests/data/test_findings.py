"""Every finding on a data set that has this one defect, and none on one that has no defect."""

import json

import numpy as np
import pytest
from data_zoo import CHATML, byte_tokenizer, space_tokenizer, write_jsonl

from jaxtune import curate, data, tiny
from jaxtune.curate.stream import EVAL, TRAIN
from jaxtune.errors import UserError

CLEAN = [json.loads(line) for line in tiny.TRAIN.read_text().splitlines()[:150]]
TOKENIZER = data.load_tokenizer(str(tiny.BASE))
NATO = """alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec
romeo sierra tango uniform victor whiskey xray yankee zulu""".split()  # noqa: SIM905


def sentence(i, n=8):
    """The i-th of many sentences that share no run of three words to speak of."""
    return " ".join(np.random.default_rng(i).choice(NATO, n))


def pair(i, answer=None):
    return {"prompt": sentence(i), "completion": sentence(1000 + i) if answer is None else answer}


def chat(i, *roles):
    return {
        "messages": [
            {"role": r, "content": sentence(100 * i + k)} for k, r in enumerate(roles or ("user", "assistant"))
        ]
    }


def examine(tmp_path, rows, *, held=None, tokenizer=TOKENIZER, **settings):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    held = held and write_jsonl(tmp_path / "held.jsonl", held)
    return curate.examine(tokenizer, path, **{"eval": held, "max_length": 256, "packing": True} | settings)


def found(report):
    """The findings but two: a token a byte is always fertile, and columns that rows have beside are named."""
    return {f.check: f for f in report.findings if f.check not in ("fertility", "not_used")}


def test_clean_data_has_no_finding(tmp_path):
    report = examine(tmp_path, CLEAN[:100], held=CLEAN[100:])
    assert report.findings == []
    s = report.summary
    assert (s["rows"], s["rows_trained"], s["eval_rows"]) == (100, 100, 50)
    rows, _, prepared = data.prepare(TOKENIZER, str(tmp_path / "rows.jsonl"), max_length=256, cache=False)
    [source] = prepared.sources
    assert (s["tokens"], s["trained_tokens"]) == (source.tokens, source.trained)
    assert sum(s["lengths"]["counts"]) == 100 and s["lengths"]["percentiles"]["100"] == rows[0].length.max()


def test_plain_text_is_counted_as_training_counts_it(tmp_path):
    report = examine(tmp_path, [{"text": sentence(i, 5 + i)} for i in range(20)], max_length=64, overlength="truncate")
    _, _, prepared = data.prepare(
        TOKENIZER, str(tmp_path / "rows.jsonl"), max_length=64, overlength="truncate", cache=False
    )
    [source] = prepared.sources
    s = report.summary
    assert (s["rows_trained"], s["tokens"], s["trained_tokens"]) == (source.kept, source.tokens, source.trained)
    assert s["over_limit"] == source.too_long > 0


PAIRS = [pair(i) for i in range(60)]
CHATS = [chat(i) for i in range(60)]
LONG = [pair(99, " ".join(sentence(i) for i in range(40)))]
EVERY_DEFECT = {
    "duplicates": ([*PAIRS, PAIRS[7]], {}, 1, ["rows.jsonl:61", "rows.jsonl:8"]),
    "near_duplicates": (
        [*PAIRS, pair(200, sentence(0, 120)), pair(201, sentence(0, 120))],
        {"max_length": 1024},
        1,
        ["rows.jsonl:62 ~", "rows.jsonl:61"],
    ),
    "conflicts": ([*PAIRS, {"prompt": PAIRS[3]["prompt"].upper(), "completion": sentence(77)}], {}, 1, ["jsonl:61"]),
    "repeated_answers": ([*PAIRS, *(pair(i, "I am sorry, no.") for i in range(100, 110))], {}, 10, ["rows.jsonl:61"]),
    "empty_answers": ([*PAIRS, pair(99, " ")], {}, 1, ["rows.jsonl:61"]),
    "empty_prompts": ([*PAIRS, {"prompt": "", "completion": sentence(99)}], {}, 1, ["rows.jsonl:61"]),
    "odd_characters": ([*PAIRS, pair(99, sentence(99) + " donâ€™t")], {}, 1, ["rows.jsonl:61", "donâ€™t"]),
    "unreadable": ([*PAIRS, {"prompt": "x", "completion": ["y"]}, {"prompt": "x"}], {}, 2, ["rows.jsonl:61"]),
    "max_length": ([*PAIRS, *LONG], {"max_length": 128}, 1, ["rows.jsonl:61"]),
    "roles": (
        [*CHATS, chat(99, "user", "user", "assistant")],
        {},
        1,
        ["user speaks twice in a row, at places 1 and 2"],
    ),
    "special_text": ([*PAIRS, pair(99, "alfa </s> bravo charlie")], {}, 1, ["'</s>' in its text"]),
    "padding": (
        [pair(i, sentence(i, 120 if i % 8 == 0 else 2)) for i in range(64)],
        {"packing": False, "max_length": 1024},
        0,
        [],
    ),
}


@pytest.mark.parametrize("check", EVERY_DEFECT)
def test_a_defect_is_found_and_no_other(tmp_path, check):
    rows, settings, count, places = EVERY_DEFECT[check]
    report = examine(tmp_path, rows, **settings)
    assert found(report).keys() == {check}
    finding = found(report)[check]
    assert finding.count == count
    assert finding.fix
    assert all(place in "\n".join(finding.rows) for place in places)


def test_preferences_whose_chosen_answer_is_trained_are_no_finding(tmp_path):
    rows = [{"prompt": p["prompt"], "chosen": p["completion"], "rejected": "no"} for p in PAIRS]
    assert found(examine(tmp_path, rows, columns={"completion": "chosen"})) == {}


def test_preferences_are_refused_as_training_refuses_them(tmp_path):
    rows = [p | {"chosen": sentence(500), "rejected": "no"} for p in PAIRS]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: preference pairs"):
        examine(tmp_path, rows)
    assert found(examine(tmp_path, rows, ignore=("chosen", "rejected"))) == {}


def test_surrogate_and_bad_role_are_listed_not_raised(tmp_path):
    rows = [*CHATS, chat(98, "usr", "assistant"), {"messages": [{"role": "user", "content": "\ud800"}]}]
    unreadable = found(examine(tmp_path, rows))["unreadable"]
    assert unreadable.severity == "error" and unreadable.count == 2
    assert "Did you mean 'user'?" in unreadable.rows[0] and "surrogate" in unreadable.rows[1]


def test_a_conversation_without_an_answer_has_an_empty_mask(tmp_path):
    report = examine(tmp_path, [*CHATS, chat(99, "user", "user")])
    assert found(report).keys() == {"roles", "empty_masks", "empty_answers"}
    assert found(report)["empty_masks"].count == 1


def test_a_prompt_that_fills_the_limit_leaves_an_empty_mask(tmp_path):
    rows = [*PAIRS, {"prompt": " ".join(sentence(i) for i in range(30)), "completion": "yes"}]
    report = examine(tmp_path, rows, max_length=128, overlength="truncate")
    assert found(report).keys() == {"empty_masks", "max_length"}
    assert report.summary["rows_trained"] == 60


def test_nothing_left_is_an_error(tmp_path):
    report = examine(tmp_path, PAIRS, max_length=4)
    assert found(report).keys() == {"nothing_left", "max_length"}
    assert found(report)["nothing_left"].severity == "error"


def test_chat_templates_that_start_twice_or_never_end(tmp_path):
    twice = "{{ bos_token }}{{ bos_token }}" + CHATML
    found_twice = found(examine(tmp_path, CHATS, tokenizer=byte_tokenizer(twice, bos="<s>"), max_length=512))
    assert found_twice["double_bos"].count == 60
    assert "double_bos" not in found(
        examine(tmp_path, CHATS, tokenizer=byte_tokenizer("{{ bos_token }}" + CHATML, bos="<s>"))
    )
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant: {% endif %}"
    several = [chat(i, *2 * ("user", "assistant")) for i in range(60)]  # the last turn gets EOS, the first has no end
    report = examine(tmp_path, several, tokenizer=byte_tokenizer(endless + prompt), max_length=1024)
    assert found(report)["no_end"].severity == "error" and found(report)["no_end"].count == 60


def test_unknown_and_byte_tokens(tmp_path):
    greek = [pair(i, "Ελληνικά " + sentence(i)) for i in range(60)]
    assert found(examine(tmp_path, greek, tokenizer=space_tokenizer(), max_length=512)).keys() == {"byte_tokens"}
    assert "byte_tokens" not in found(examine(tmp_path, PAIRS, tokenizer=space_tokenizer(), max_length=512))
    blind = word_tokenizer()
    rows = [*PAIRS, pair(99, "alfa omega bravo")]
    unknown = found(examine(tmp_path, rows, tokenizer=blind))["unknown_tokens"]
    assert unknown.rows[0].startswith(str(tmp_path / "rows.jsonl:61"))
    assert "unknown_tokens" not in found(examine(tmp_path, PAIRS, tokenizer=blind))


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", "</s>", *NATO])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")


def test_a_foreign_tokenizer(tmp_path):
    assert found(examine(tmp_path, PAIRS, vocab_size=100)).keys() == {"vocabulary"}


# ------------------------------------------------------------------------------------------- training and evaluation


def test_overlap_of_training_and_evaluation(tmp_path):
    held = [pair(i) for i in range(500, 520)]
    assert found(examine(tmp_path, PAIRS, held=held)) == {}
    exact = found(examine(tmp_path, PAIRS, held=[*held, PAIRS[5]]))
    assert exact.keys() == {"overlap"} and exact["overlap"].severity == "error"
    assert exact["overlap"].rows == (f"{tmp_path}/held.jsonl:21 = {tmp_path}/rows.jsonl:6",)
    assert exact["overlap"].drops.tolist() == [5]
    prompt = found(examine(tmp_path, PAIRS, held=[*held, pair(5, sentence(800))]))
    assert prompt.keys() == {"overlap"} and prompt["overlap"].severity == "warning"
    long = " ".join(sentence(i) for i in range(3))
    near = examine(tmp_path, [*PAIRS, pair(99, long)], held=[*held, pair(99, long + " zulu")], max_length=512)
    assert found(near).keys() == {"overlap", "near_overlap"}  # the prompt is the same, too
    assert found(near)["near_overlap"].drops.tolist() == [60]


def test_the_rows_held_out_are_those_of_training(tmp_path):
    report = examine(tmp_path, CLEAN, eval_fraction=0.2)
    path = str(tmp_path / "rows.jsonl")
    [train], held, _ = data.prepare(TOKENIZER, path, eval_fraction=0.2, max_length=256, cache=False)
    ledger = report.ledger
    for split, rows in ((TRAIN, train), (EVAL, held)):
        assert sorted(ledger.number[ledger.rows(split)]) == sorted(rows.origin)


# ------------------------------------------------------------------------------------------------------------ balance


def labelled(n, answer, **columns):
    return [pair(i, answer) | columns for i in range(n, n + 30)]


def test_balance_of_classes_and_groups(tmp_path):
    even = [*labelled(0, "yes"), *labelled(30, "no")]
    assert found(examine(tmp_path, even)) == {}
    report = examine(tmp_path, [*even, pair(99, "perhaps")])
    assert found(report).keys() == {"class_balance"}
    assert report.summary["groups"]["answer"] == [
        {"value": "yes", "rows": 30},
        {"value": "no", "rows": 30},
        {"value": "perhaps", "rows": 1},
    ]


def test_a_group_that_decides_the_answer(tmp_path):
    rows = [*labelled(0, "yes", sex="f"), *labelled(30, "no", sex="m"), pair(90, "no") | {"sex": "f"}]
    assert found(examine(tmp_path, rows)).keys() == {"group_bias"}
    mixed = [row | {"sex": "fm"[i % 2]} for i, row in enumerate(rows)]
    assert found(examine(tmp_path, mixed)) == {}
    rare = [row | {"language": "de" if i < 1 else "en"} for i, row in enumerate(mixed)]
    assert found(examine(tmp_path, rare)).keys() == {"group_balance"}


# ------------------------------------------------------------------------------------------------------- the real sets


@pytest.mark.parametrize(
    "name, settings",
    [
        (
            "banking77/train.csv",
            {"columns": {"prompt": "text", "completion": "category"}, "eval": "banking77/test.csv"},
        ),
        ("bfcl/BFCL_v4_simple_python.json", {"template": "{id}\n{question}"}),
        ("gsm8k/train.jsonl", {"columns": {"prompt": "question", "completion": "answer"}, "eval": "gsm8k/test.jsonl"}),
        ("ifeval/input_data.jsonl", {"columns": {"text": "prompt"}}),
        ("mt_bench/question.jsonl", {"template": "{category}\n{question_id}"}),
        ("tinystories/tinystories_sample.txt", {"overlength": "split"}),
        ("toolcall/glaive_toolcall_en_demo.json", {}),
        ("wikisql/train.jsonl", {"completion_from": "\nA:", "eval": "wikisql/test.jsonl"}),
        ("wikitext2/valid.txt", {"overlength": "split"}),
    ],
)
@pytest.mark.slow
def test_real_data_without_a_crash(assets, name, settings):
    if settings.get("eval"):
        settings = settings | {"eval": str(assets / "data" / settings["eval"])}
    report = curate.examine(TOKENIZER, str(assets / "data" / name), max_length=1024, **settings)
    assert report.summary["rows"] + sum(f.count for f in report.findings if f.check == "unreadable") > 0
    json.dumps(report.as_json())
