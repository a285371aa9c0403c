"""Rows as people have them: what of each is trained, or what is said where it cannot be.

The inputs are those of public bug reports of other fine-tuning tools.
"""

import json
from pathlib import Path

import pytest
from data_zoo import CHATML, OPEN, byte_tokenizer, trained_runs, write_jsonl

from jaxtune import data
from jaxtune.data.rows import NO_END
from jaxtune.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
WEATHER = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call></s>'
ASKED = {"role": "user", "content": "Weather in Rome?"}
SCHEMA = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(**function):
    return [ASKED, assistant("", tool_calls=[function])]


@pytest.fixture
def prepare(tmp_path):
    """Tokenise rows: (text of each row, trained runs of each row, report)."""

    def run(*rows, template=CHATML, eos="<|im_end|>", tokenizer=None, **settings):
        tokenizer = tokenizer or byte_tokenizer(template, eos=eos)
        path = write_jsonl(tmp_path / "d.jsonl", rows)
        (found,), _, report = data.prepare(tokenizer, path, max_length=8192, cache=False, **settings)
        pairs = [found[i] for i in range(len(found))]
        return [tokenizer.decode(ids) for ids, _ in pairs], [trained_runs(tokenizer, *pair) for pair in pairs], report

    return run


def default(prepare, *rows, **settings):
    """With jaxtune's own template, which writes all that a message can hold."""
    return prepare(*rows, template=None, eos="</s>", **settings)


def template(name):
    return (TEMPLATES / name).read_text()


# ------------------------------------------------------------------------------------- fields of messages and calls


@pytest.mark.parametrize("flag", ["weight", "train", "training", "trainable", "loss"])
def test_a_turn_that_is_not_to_be_trained_is_not(prepare, flag):
    no, yes = (0, 1) if flag == "weight" else (False, True)
    row = [user("2+2?", **{flag: no}), assistant("5", **{flag: no}), user("Sure?"), assistant("4", **{flag: yes})]
    _, runs, report = prepare({"messages": row})
    assert runs == [["4<|im_end|>"]] and report.ends.total() == 1
    _, runs, _ = prepare({"messages": [user("2+2?"), assistant("4"), user("Sure?"), assistant("5", **{flag: no})]})
    assert runs == [["4<|im_end|>"]]
    _, runs, _ = prepare({"messages": row[:3]}, {"messages": row})
    assert runs == [["4<|im_end|>"]]  # a row without a trained turn is dropped, and counted


def test_a_turn_that_is_not_trained_may_stand_behind_a_system_message_that_is_folded(prepare):
    row = [{"role": "system", "content": "s"}, user("a"), assistant("b", weight=0), user("c"), assistant("d")]
    assert prepare({"messages": row}, system_as_user=True)[1] == [["d<|im_end|>"]]
    assert prepare({"messages": row[1:]}, system="s")[1] == [["d<|im_end|>"]]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (assistant("b", weight=0.5), r"message 2 \(assistant\): 'weight' is 0.5"),
        (assistant("b", weight="yes"), r"'weight' is \"yes\""),
        (assistant("b", weight=1, train=False), r"weight and train say different things"),
        (user("b", train=True), r"'train' asks to train on it, but only the assistant.s messages are trained"),
        (assistant("b", images=["x.png"]), r"'images' would change what is trained.*data.ignore=images"),
        (assistant("b", train_detail=[]), None),
        (assistant("b", train_detail=[{"begin_offset": 0}]), r"'train_detail' would change"),
        (assistant("b", reasoning="x", thinking="y"), r"reasoning and thinking say different things"),
        (assistant("b", reasoning=["x"]), r"its thoughts are a list"),
        (user("b", tool_calls=[{"name": "f", "arguments": {}}]), r"has tool_calls, which only the assistant makes"),
    ],
)
def test_fields_that_would_change_what_is_trained(prepare, message, said):
    row = {"messages": [user("a"), message, assistant("c")]}
    if said is None:
        prepare(row)
        return
    with pytest.raises(UserError, match=said):
        prepare(row)


def test_fields_that_change_nothing_are_counted_and_can_be_ignored(prepare):
    rows = [{"messages": [user("a", id=1, time=i), assistant("b", time=i)], "source": "x"} for i in range(3)]
    _, _, report = prepare(*rows)
    lines = "\n".join(report.lines())
    assert "columns that are not used: source (3), first at" in lines
    assert "fields of messages that are not used: time (6), first at" in lines and "d.jsonl:1" in lines
    assert "not used" not in "\n".join(prepare(*rows, ignore=("source", "time"))[2].lines())
    reads = CHATML.replace("{{ m.content }}", "{{ m.time }}{{ m.content }}")
    assert "fields of" not in "\n".join(prepare(*rows, template=reads)[2].lines())  # then the template shows it


def test_notes_are_those_of_a_file_read_from_the_cache_too(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    rows = [{"messages": [user("a"), assistant("b")], "source": "x"}]
    lines = []
    for name in ("one.jsonl", "two.jsonl"):
        path = write_jsonl(tmp_path / name, rows)
        report = data.prepare(byte_tokenizer(CHATML, eos="<|im_end|>"), path, max_length=64)[2]
        lines.append(report.lines()[1])
        assert report.ends.total() == 1
    assert report.sources[0].cached
    assert lines[1] == lines[0].replace("one.jsonl", "two.jsonl") and "two.jsonl:1" in lines[1]


@pytest.mark.parametrize(
    "messages",
    [
        call(function={"name": "weather", "arguments": {"city": "Rome"}}),
        call(function={"name": "weather", "arguments": '{"city": "Rome"}'}),
        call(name="weather", parameters={"city": "Rome"}),
        call(name="weather", args={"city": "Rome"}, id="c1"),
        call(type="tool_use", name="weather", input={"city": "Rome"}),
        call(function="weather", arguments={"city": "Rome"}),
        [ASKED, assistant("", function_call={"name": "weather", "arguments": '{"city": "Rome"}'})],
        [ASKED, {"role": "function_call", "content": '{"name": "weather", "parameters": {"city": "Rome"}}'}],
        [ASKED, {"role": "tool_call", "content": {"name": "weather", "arguments": {"city": "Rome"}}}],
    ],
)
def test_calls_under_the_names_of_others(prepare, messages):
    assert default(prepare, {"messages": messages})[1] == [[WEATHER]]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ({"name": "now", "arguments": None}, r"message 2: the tool call 'now' has no arguments.*Write an empty object"),
        ({"name": "now"}, r"'now' has no arguments"),
        ({"name": "now", "kwargs": {"a": 1}}, r"found name, kwargs"),
        ({"name": "now", "arguments": [1]}, r"the arguments of 'now' are a list, expected an object"),
        ({"name": "now", "arguments": {"a": 1}, "input": {"a": 2}}, r"arguments and input say different things"),
        ({"arguments": {}}, r"a tool call needs a name"),
    ],
)
def test_calls_that_say_too_little(prepare, function, said):
    with pytest.raises(UserError, match=said):
        default(prepare, {"messages": call(function=function)})


def test_what_else_a_call_holds_is_counted(prepare):
    report = default(prepare, {"messages": call(name="weather", arguments={"city": "Rome"}, result="12C")})[2]
    assert "fields of tool calls that are not used: result (1)" in report.lines()[1]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thought", "cot"])
def test_thoughts_in_a_field_of_their_own_are_trained(prepare, name):
    row = {"messages": [user("3*4?"), assistant("12", **{name: "four threes"})]}
    assert default(prepare, row)[1] == [["<think>\nfour threes\n</think>\n\n12</s>"]]
    with pytest.raises(UserError, match=r"message 2 \(assistant\): .*leaves out its thoughts \(four threes\)"):
        prepare(row)
    _, runs, report = prepare(row, allow_left_out=("thoughts",))
    assert runs == [["12<|im_end|>"]] and "left out by the chat template: thoughts (1)" in report.lines()[1]


# ------------------------------------------------------------------------------------- roles, and forms of messages


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *[(r, "user") for r in ("human", "User", "HUMAN", "prompter")],
        *[(r, "assistant") for r in ("gpt", "model", "chatgpt", "Assistant", "bot")],
        ("developer", "system"),
        *[(r, "tool") for r in ("function", "observation", "tool_response")],
    ],
)
def test_role_names_of_other_tools(prepare, theirs, ours):
    turns = [user("Hi"), assistant("Ho"), {"role": ours, "content": "there"}, assistant("So")]
    named = [m if m["role"] != ours else {"from": theirs, "value": m["content"]} for m in turns]
    assert prepare({"conversations": named})[:2] == prepare({"conversations": turns})[:2]


def test_roles_are_mapped_by_name(prepare):
    row = {"messages": [{"role": "customer", "content": "Hi"}, {"role": "agent", "content": "Ho"}]}
    with pytest.raises(UserError, match=r"unknown role 'customer'.*data.roles=customer=user"):
        prepare(row)
    assert prepare(row, roles={"customer": "user", "agent": "assistant"})[1] == [["Ho<|im_end|>"]]
    with pytest.raises(UserError, match=r"data.roles: customer=usr: 'usr' is no role.*Did you mean 'user'"):
        prepare(row, roles={"customer": "usr"})
    with pytest.raises(UserError, match=r"data.roles has no effect on plain text"):
        prepare({"text": "x"}, roles={"customer": "user"})


def test_messages_as_an_object_of_lists(prepare):
    row = {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Ho"], "weight": [None, 1]}}
    assert prepare(row)[1] == [["Ho<|im_end|>"]]
    with pytest.raises(UserError, match="lists of different lengths"):
        prepare({"messages": {"role": ["user", "assistant"], "content": ["Hi"]}})


def test_tools_and_answers_as_objects(prepare):
    messages = [*call(name="weather", arguments={"city": "Rome"}), {"role": "tool", "content": {"temp": 12}}]
    row = {"messages": [*messages, assistant({"answer": "12°"})], "tools": SCHEMA}
    [text], runs, _ = default(prepare, row)
    assert '### Tool:\n{"temp": 12}\n' in text and json.dumps({"type": "function", "function": SCHEMA}) in text
    assert runs == [[WEATHER, '{"answer": "12°"}</s>']]


def test_prompt_and_completion_as_messages(prepare):
    prompt = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    row = {"prompt": prompt, "completion": [assistant("d", tool_calls=[{"name": "f", "arguments": {}}])]}
    row["completion"] += [{"role": "tool", "content": "1"}, assistant("e")]
    _, runs, report = default(prepare, {**row, "tools": [{"name": "f", "parameters": {}}]})
    called = 'd\n<tool_call>{"name": "f", "arguments": {}}</tool_call></s>'
    assert runs == [[called, "e</s>"]] and report.sources[0].format == "prompt_completion"
    assert prepare({"prompt": [user("Hi")], "completion": [assistant("Ho")]})[1] == [["Ho<|im_end|>"]]
    assert prepare({"prompt": [user("Hi")], "completion": "Ho"})[1] == [["Ho<|im_end|>"]]


# ------------------------------------------------------------------------------------- columns


def test_tools_in_whatever_row_and_under_either_name(prepare):
    bare = {"messages": [user("x"), assistant("y")]}
    texts, _, _ = default(prepare, bare, {**bare, "tools": [SCHEMA]}, {**bare, "functions": [SCHEMA]})
    assert "### Tools" not in texts[0] and "### Tools" in texts[1] and texts[1] == texts[2]
    with pytest.raises(UserError, match="tools and functions name different tools"):
        default(prepare, {**bare, "tools": [SCHEMA], "functions": [{**SCHEMA, "name": "other"}]})


def test_rows_that_differ_in_a_later_column_only_are_no_duplicates(tmp_path):
    bare = {"messages": [user("x"), assistant("y")]}
    rows = [bare, {**bare, "tools": [SCHEMA]}, {**bare, "tools": [{**SCHEMA, "name": "other"}]}, {**bare, "tools": []}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    (found,), _, _ = data.prepare(byte_tokenizer(None), path, max_length=4096, cache=False)
    assert len(set(found.digest.tolist())) >= 3


def test_history_and_system_of_instructions(prepare):
    row = {"instruction": "And its capital?", "input": "", "output": "Rome", "system": "Be brief"}
    texts, runs, _ = prepare({**row, "history": [["Which country is a boot?", "Italy"]]})
    turns = ["system\nBe brief", "user\nWhich country is a boot?", "assistant\nItaly"]
    turns += ["user\nAnd its capital?", "assistant\nRome"]
    assert texts == ["".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)]
    assert runs == [["Italy<|im_end|>", "Rome<|im_end|>"]]
    with pytest.raises(UserError, match=r"column 'history' is a list, expected a list of \[question, answer\]"):
        prepare({**row, "history": ["Which"]})
    with pytest.raises(UserError, match=r"column 'history' needs a conversation"):
        default(prepare, {**row, "history": [["a", "b"]]})


def test_context_and_system_beside_a_pair(prepare):
    row = {"question": "Who?", "context": "It is Bob.", "answer": "Bob", "id": 3}
    columns = {"prompt": "question", "completion": "answer"}
    texts, runs, _ = prepare(row, columns=columns)
    assert "user\nWho?\n\nIt is Bob.<|im_end|>" in texts[0] and runs == [["Bob<|im_end|>"]]
    orca = {"system_prompt": "Be brief", "question": "Hi", "response": "Ho"}
    columns = {"prompt": "question", "completion": "response"}
    with pytest.raises(UserError, match=r"column 'system_prompt' would change.*data.columns=system=system_prompt"):
        prepare(orca, columns=columns)
    assert "system\nBe brief" in prepare(orca, columns=columns | {"system": "system_prompt"})[0][0]
    assert "Be brief" not in prepare(orca, columns=columns, ignore=("system_prompt",))[0][0]
    with pytest.raises(UserError, match="has a system message and another text in column 'system'"):
        prepare({"messages": [{"role": "system", "content": "a"}, user("b"), assistant("c")], "system": "d"})


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"prompt": "a", "completion": "b", "x": "c"}, {"messages": "x"}, r"messages=x has no effect on prompt_compl"),
        ({"prompt": "a", "completion": "b"}, {"system": "x"}, r"no column 'x' for 'system', nor has any"),
    ],
)
def test_mapped_columns_without_effect_are_refused(prepare, row, columns, said):
    with pytest.raises(UserError, match=said):
        prepare(row, columns=columns, format="prompt_completion")


@pytest.mark.parametrize("verdict", [True, False, 0, 1, "false"])
def test_judged_answers_are_refused_in_any_row(prepare, verdict):
    good = {"prompt": "a", "completion": "b"}
    for rows in ([{**good, "label": verdict}], [good, {**good, "label": verdict}]):
        with pytest.raises(UserError, match=r"answers judged good or bad.*data.ignore=label"):
            prepare(*rows)
    prepare({**good, "label": verdict}, ignore=("label",))


def test_preference_pairs_are_refused(prepare):
    row = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    with pytest.raises(UserError, match=r"d\.jsonl:1: preference pairs"):
        prepare(row)
    with pytest.raises(UserError, match=r"d\.jsonl:2: preference pairs"):
        prepare({"prompt": "a", "completion": "b"}, row)
    assert prepare({"prompt": "a", "chosen": "c", "rejected": "d"}, columns={"completion": "chosen"})[1] == [
        ["c<|im_end|>"]
    ]


def test_nan_is_no_text(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a?", "completion": NaN}\n{"prompt": "b?", "completion": 3.0}\n')
    with pytest.raises(UserError, match=r"d\.jsonl:1: column 'completion' is null, expected text"):
        data.prepare(byte_tokenizer(CHATML), str(tmp_path / "d.jsonl"), max_length=64, cache=False)


def test_format_specs_of_a_template_are_obeyed(tmp_path):
    path, tokenizer = write_jsonl(tmp_path / "d.jsonl", [{"price": 3.14159, "name": "pen"}]), byte_tokenizer(None)

    def text(template):
        (rows,), _, _ = data.prepare(tokenizer, path, template=template, max_length=64, cache=False)
        return tokenizer.decode(rows[0][0], skip_special_tokens=True)

    assert text("{name!r}: {price:.2f}") == "'pen': 3.14"
    with pytest.raises(UserError, match=r"d\.jsonl:1: data.template: \{name:\.2f\} of 'pen', text: "):
        text("{name:.2f}")


@pytest.mark.parametrize(
    ("row", "columns", "text"),
    [
        ({"input": "a", "output": "b"}, {"instruction": "input"}, "a\nb</s>"),
        ({"q": "a", "context": "c", "output": "b"}, {"instruction": "q", "input": "context"}, "a\n\nc\nb</s>"),
        ({"context": "a", "completion": "b"}, {"prompt": "context"}, "a\nb</s>"),
        ({"system": "a", "completion": "b"}, {"prompt": "system"}, "a\nb</s>"),
    ],
)
def test_a_column_of_the_file_is_read_once(prepare, row, columns, text):
    texts, _, report = default(prepare, row, columns=columns)
    assert texts == [text] and len(report.lines()) == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"text_pair": "x"}, "a column 'text_pair'.*objective.name=sequence_classification"),
        ({"Answer": "x"}, "a column 'Answer'"),
        ({"summary": "x"}, "a column 'summary'.*data.columns=prompt=text,completion=summary trains it"),
    ],
)
def test_a_text_with_a_pair_or_an_answer_is_no_plain_text_unless_that_is_said(prepare, more, said):
    row = {"text": "a", **more}
    with pytest.raises(UserError, match=said):
        default(prepare, row)
    (column,) = more
    for settings in ({"format": "text"}, {"ignore": (column,)}, {"columns": {"text": "text"}}):
        assert default(prepare, row, **settings)[0] == ["a</s>"]
    if column == "summary":
        assert default(prepare, row, columns={"prompt": "text", "completion": "summary"})[1] == [["x</s>"]]


def test_labels_of_texts_that_are_trained_as_text_are_told(prepare):
    texts, _, report = default(prepare, {"text": "a", "label": 1}, {"text": "b", "label": 0})
    said = "labels that are not trained (objective.name=sequence_classification learns them): label (2), first at"
    assert texts == ["a</s>", "b</s>"] and said in report.lines()[1]


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"question": "a", "response": "b", "system_prompt": "c"}, "prompt=question,completion=response,system=system"),
        ({"input": "a", "target": "b"}, "prompt=input,completion=target"),
        ({"sentence1": "a", "sentence2": "b", "label": 1}, "objective.name=sequence_classification"),
        ({"tokens": ["a"], "labels": [1]}, "objective.name=token_classification"),
    ],
)
def test_columns_that_fit_nothing_get_the_setting_that_reads_them(prepare, row, hint):
    with pytest.raises(UserError, match=f"fit no known format.*{hint}") as error:
        default(prepare, row)
    if "objective" not in hint:
        columns = str(error.value).partition("data.columns, for example ")[2].rstrip(".")
        assert default(prepare, row, columns=dict(pair.split("=") for pair in columns.split(",")))[1] == [["b</s>"]]


@pytest.mark.parametrize(
    ("column", "value", "ours"),
    [
        *[(name, "c", "context") for name in ("passage", "document", "evidence")],
        *[(name, [["x", "y"]], "history") for name in ("chat_history", "conversation_history")],
        *[(name, [SCHEMA], "tools") for name in ("available_tools", "tool_schemas")],
        *[(name, "s", "system") for name in ("system_prompt", "System_Message", "sys_prompt")],
        *[(name, "c", None) for name in ("reasoning", "rationale", "cot")],
        *[(name, 0.5, None) for name in ("weight", "sample_weight")],
    ],
)
def test_columns_that_would_change_what_is_trained_are_read_by_name_or_refused(prepare, column, value, ours):
    row = {"prompt": "a", "completion": "b", column: value}
    read = f"read it with data.columns={ours}={column}, or ignore" if ours else "ignore"
    with pytest.raises(UserError, match=f"column '{column}' would change.*: {read} it with data.ignore={column}"):
        prepare(row)
    assert prepare(row, ignore=(column,))[:2] == prepare({"prompt": "a", "completion": "b"})[:2]
    if ours:
        assert prepare(row, columns={ours: column})[:2] == prepare({"prompt": "a", "completion": "b", ours: value})[:2]


def test_guanaco_text_trains_one_side_only(prepare):
    row = {"text": "### Human: Hi### Assistant: Ho### Human: And?### Assistant: So"}
    _, runs, report = prepare(row, completion_from="### Assistant:")
    assert len(runs[0]) == 1 and "more than once" in report.lines()[1] and "data.prompt_from" in report.lines()[1]
    _, runs, report = prepare(row, completion_from="### Assistant:", prompt_from="### Human:")
    assert runs == [[" Ho", " So<|im_end|>"]] and report.lines()[1].startswith("1 of 2 trained turns do not end")
    with pytest.raises(UserError, match=r"data.prompt_from has no effect without data.completion_from"):
        prepare(row, prompt_from="### Human:")


# ------------------------------------------------------------------------------------- the text against the messages


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Ho<|im_end|>"),
        ("<|im_start|>system\nx<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Ho"),
        ("<s>[INST] Hi [/INST]", "Ho"),
        ("Hi", "Ho<|im_end|>"),
        ("Hi<|im_end|>\n<|im_start|>assistant", "Ho"),
    ],
)
def test_what_is_rendered_already_is_not_rendered_again(prepare, prompt, completion):
    with pytest.raises(UserError, match=r"a chat template was already applied to it.*data.template='{prompt}{compl"):
        prepare({"prompt": prompt, "completion": completion})


def test_what_is_rendered_already_can_be_taken_as_it_stands(tmp_path):
    row = {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "completion": "Ho<|im_end|>"}
    path, tokenizer = write_jsonl(tmp_path / "d.jsonl", [row]), byte_tokenizer(CHATML, eos="<|im_end|>")
    (rows,), _, _ = data.prepare(tokenizer, path, template="{prompt}{completion}", max_length=64, cache=False)
    assert tokenizer.decode(rows[0][0]) == row["prompt"] + row["completion"]
    assert trained_runs(tokenizer, *rows[0]) == ["Ho<|im_end|>"]


def test_what_the_template_left_out_is_counted_by_kind(prepare):
    system = {"role": "system", "content": "Be brief."}
    row = {"messages": [system, user("3*4?"), assistant("<think>four threes</think>12")], "tools": [SCHEMA]}
    with pytest.raises(UserError, match=r"message 3 \(assistant\): .*its thoughts \(four threes\)"):
        prepare(row, template=template("thoughtless.jinja"))
    _, runs, report = prepare(row, template=template("thoughtless.jinja"), allow_left_out=("thoughts",))
    assert runs == [["12<|im_end|>"]]
    assert "left out by the chat template: system messages (1), thoughts (1), tools (1)" in report.lines()[1]
    with pytest.raises(UserError, match=r"data.allow_left_out: 'thought' is none of answers, calls, thoughts"):
        prepare(row, allow_left_out=("thought",))


def test_an_answer_that_vanishes_is_an_error(prepare):
    short = CHATML.replace("{{ m.content }}", "{{ m.content[:2] }}")
    with pytest.raises(UserError, match=r"message 2.*"):
        prepare({"messages": [user("ab"), assistant("Hello there")]}, template=short)
    calls_alone = CHATML.replace("{{ m.content }}", "{{ '' if m.tool_calls else m.content }}{{ m.tool_calls }}")
    row = call(name="weather", arguments={"city": "Rome"})
    prepare({"messages": row}, template=calls_alone)
    row[1]["content"] = "I shall see."
    with pytest.raises(UserError, match=r"its answers \(I shall see\.\)"):
        prepare({"messages": row}, template=calls_alone)


def test_calls_that_the_template_leaves_out_can_be_allowed(prepare):
    row = [*call(name="weather", arguments={"city": "Rome"}), {"role": "tool", "content": "12"}, assistant("Warm.")]
    row[1]["content"] = "I shall see."
    with pytest.raises(UserError, match=r"leaves out its calls \(weather\).*data.allow_left_out=calls"):
        prepare({"messages": row})
    _, runs, report = prepare({"messages": row}, allow_left_out=("calls",))
    assert runs == [["I shall see.<|im_end|>", "Warm.<|im_end|>"]]
    assert "left out by the chat template: calls (1)" in report.lines()[1]


def test_thoughts_of_earlier_turns_are_counted(prepare, qwen3):
    asked = ["1+1?", "2+2?", "3+3?"]
    turns = [m for q in asked for m in (user(q), assistant(str(2 * int(q[0])), reasoning_content=f"twice {q[0]}"))]
    _, runs, report = prepare({"messages": turns}, tokenizer=qwen3)
    assert runs == [["2<|im_end|>", "4<|im_end|>", "<think>\ntwice 3\n</think>\n\n6<|im_end|>"]]
    assert "left out by the chat template: thoughts of earlier turns (2), first at" in report.lines()[1]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("    return x\n", "indentation of the first line (1)"),
        ("\n\treturn x", "indentation of the first line (1)"),
        ("return x ", "white space at the ends of messages (1)"),
        ("return x\n", None),
        ("return x\n    if y", None),
    ],
)
def test_indentation_that_was_trimmed_is_counted(prepare, answer, said):
    trims = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
    row = {"messages": [user("def f(x):"), assistant(answer)]}
    lines = prepare(row, template=trims)[2].lines()[1:]
    assert lines == [] if said is None else f"left out by the chat template: {said}" in lines[0]
    assert len(prepare(row)[2].lines()) == 1


def test_a_system_message_is_folded_into_the_users(prepare):
    rows = [{"messages": [{"role": "system", "content": "Be brief"}, user("Hi"), assistant("Ho")]}]
    with pytest.raises(UserError, match=r"\(system, user, assistant\): System role not supported.*system_as_user"):
        prepare(*rows, template=template("gemma.jinja"))
    texts, runs, _ = prepare(*rows, template=template("gemma.jinja"), system_as_user=True)
    assert texts == ["<|im_start|>user\nBe brief\n\nHi<|im_end|>\n<|im_start|>model\nHo<|im_end|>\n"]
    assert runs == [["Ho<|im_end|>"]]
    with pytest.raises(UserError, match=r"\(user, user, assistant\): Conversation roles must alternate"):
        prepare({"messages": [user("Hi"), user("there"), assistant("Ho")]}, template=template("gemma.jinja"))


# ------------------------------------------------------------------------------------- how turns end


def test_the_next_roles_token_ends_a_turn_on_every_turn(prepare):
    tokenizer = byte_tokenizer(template("next_role.jinja"))
    roles = ["<|user|>", "<|assistant|>", "<|observation|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": roles})
    messages = [*call(name="weather", arguments={"city": "Rome"}), {"role": "tool", "content": "12"}]
    messages += [assistant("12 degrees"), user("Thanks"), assistant("Bye")]
    _, runs, report = prepare({"messages": messages}, tokenizer=tokenizer)
    called = '<tool_call>weather {"city": "Rome"}</tool_call><|observation|>'
    assert runs == [[called, "12 degrees<|user|>", "Bye</s>"]]
    ends = {tokenizer.convert_ids_to_tokens(i): n for i, n in report.ends.items()}
    assert ends == {"<|observation|>": 1, "<|user|>": 1, "</s>": 1} and len(report.lines()) == 1


def test_turns_that_nothing_ends_are_said(prepare):
    row = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    _, _, report = prepare(row, template=OPEN, eos="</s>")
    assert report.ends[NO_END] == 1
    assert report.lines()[1].startswith("1 of 2 trained turns do not end with a special token of the tokenizer")


@pytest.mark.parametrize(
    ("name", "trained", "ended"),
    [
        (
            "tags_around_header.jinja",
            ["<|im_start|>assistant\nHo<|im_end|>\n", "<|im_start|>assistant\ny<|im_end|>\n"],
            2,
        ),
        ("tags_without_end.jinja", ["Ho<|im_end|>", "y<|im_end|>"], 2),  # the end is trained, whatever the marks
    ],
)
def test_generation_marks_around_the_header_or_without_the_end(prepare, name, trained, ended):
    row = {"messages": [user("Hi"), assistant("Ho"), user("x"), assistant("y")]}
    _, runs, report = prepare(row, template=template(name))
    assert runs == [trained] and report.ends[NO_END] == 0 and report.ends.total() == ended


def test_marks_are_dropped_for_turns_that_are_not_trained(prepare):
    row = {"messages": [user("Hi"), assistant("Ho", weight=0), user("x"), assistant("y")]}
    assert prepare(row, template=template("tags_without_end.jinja"))[1] == [["y<|im_end|>"]]
