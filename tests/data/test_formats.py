import hashlib
import json

import pytest
from data_zoo import write_jsonl

from jaxtune.data import read
from jaxtune.data.formats import ColumnTypes, Conversation, Document, Reader, make_reader
from jaxtune.errors import UserError


@pytest.fixture
def convert(tmp_path):
    """Write rows, make a reader with the settings, and return (format, examples)."""

    def run(*rows, **settings):
        source = read(write_jsonl(tmp_path / "a.jsonl", rows))
        reader = make_reader(source, **settings)
        return reader.format, [reader.convert(source.where(number), row) for number, row in source]

    return run


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def test_formats_are_found_from_the_columns(convert):
    turns = [user("hi"), assistant("ho")]
    assert convert({"messages": turns}) == ("chat", [Conversation(turns)])
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    assert convert({"conversations": shared}) == ("sharegpt", [Conversation(turns)])
    assert convert({"text": "x", "id": 1}) == ("text", [Document((("x", True),))])
    pair = Document((("hi\n", False), ("ho", True)))
    assert convert({"prompt": "hi", "completion": "ho"}) == ("prompt_completion", [pair])
    assert convert({"instruction": "hi", "output": "ho", "input": ""}) == ("instruction", [pair])
    given = Document((("hi\n\nthere\n", False), ("ho", True)))
    assert convert({"instruction": "hi", "output": "ho", "input": "there"})[1] == [given]


@pytest.mark.parametrize(
    ("prompt", "completion", "joined"),
    [("Q", "A", "Q\n"), ("Q ", "A", "Q "), ("Q", " A", "Q"), ("Q\n", "A", "Q\n"), ("", "A", "")],
)
def test_a_newline_joins_only_where_there_is_no_white_space(convert, prompt, completion, joined):
    _, [document] = convert({"prompt": prompt, "completion": completion})
    assert document.pieces == ((joined, False), (completion, True))


def test_columns_map_our_names_to_theirs(convert):
    row = {"question": "hi", "answer": 4, "text": "something else"}
    columns = {"prompt": "question", "completion": "answer"}
    assert convert(row, columns=columns) == ("prompt_completion", [Document((("hi\n", False), ("4", True)))])
    turns = [user("hi"), assistant("ho")]
    assert convert(row, columns=columns, chat=True)[1] == [Conversation([user("hi"), assistant("4")])]
    assert convert({"dialog": turns}, columns={"messages": "dialog"})[1] == [Conversation(turns)]


def test_a_template_trains_from_its_last_placeholder(convert):
    row = {"q": "hi", "a": "ho", "n": 3}
    assert convert(row, template="Q{n}: {q}\nA: {a}.") == (
        "template",
        [Document((("Q3: hi\nA: ", False), ("ho.", True)))],
    )
    assert convert(row, template="{{{a}}}")[1] == [Document((("{", False), ("ho}", True)))]
    assert convert(row, template="Q: {q}\nA: {a}", completion_from="Q:")[1][0].pieces == (
        ("Q:", False),
        (" hi\nA: ho", True),
    )


def test_completion_from_marks_the_start_of_what_is_trained(convert):
    assert convert({"text": "Q\nA: x A: y"}, completion_from="A:")[1] == [
        Document((("Q\nA:", False), (" x A: y", True)))
    ]
    with pytest.raises(UserError, match=r"a\.jsonl:1: data.completion_from='B:' does not occur"):
        convert({"text": "Q\nA: x"}, completion_from="B:")


def test_a_system_prompt_stands_first_unless_there_is_one(convert):
    own = {"role": "system", "content": "own"}
    ours = {"role": "system", "content": "be kind"}
    _, both = convert({"messages": [user("x")]}, {"messages": [own, user("x")]}, system="be kind")
    assert [c.messages[0] for c in both] == [ours, own]
    _, [column] = convert({"conversations": [user("x")], "system": "row's"}, system="be kind")
    assert column.messages[0]["content"] == "row's"
    _, [document] = convert({"prompt": "x", "completion": "y"}, system="be kind")
    assert document.pieces[0] == ("be kind\n\nx\n", False)


def test_tools_and_calls_take_the_form_chat_templates_expect(convert):
    schema = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    shared = [
        {"from": "human", "value": "go"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "[2]"},
        {"from": "gpt", "value": "done"},
    ]
    openai = [
        user("go"),
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "content": "[2]"},
        assistant("done"),
    ]
    wanted = Conversation(
        [user("go"), assistant("", tool_calls=[call]), {"role": "tool", "content": "[2]"}, assistant("done")],
        [{"type": "function", "function": schema}],
    )
    assert convert({"conversations": shared, "tools": json.dumps([schema])})[1] == [wanted]
    assert convert({"messages": openai, "tools": [{"type": "function", "function": schema}]})[1] == [wanted]
    assert convert({"messages": openai, "tools": "[]"})[1][0].tools is None


def test_content_parts_are_joined_and_pictures_refused(convert):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert convert({"messages": [user(parts)]})[1][0].messages == [user("ab")]
    with pytest.raises(UserError, match=r"message 1: content holds a part of type 'image'; only text"):
        convert({"messages": [user([{"type": "image", "url": "x"}])]})


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"question": "a", "answer": "b"}, {}, r"Columns found: question, answer\..*prompt=question,completion=answer"),
        ({"chat": []}, {}, r"Columns found: chat\..*messages=chat"),
        ({"body": "x"}, {}, r"text=body"),
        ({"prompt": "a"}, {"format": "prompt_completion"}, r"needs completion.*Columns found: prompt"),
        ({"a": "x"}, {"columns": {"prompt": "qestion"}}, r"no column 'qestion' for 'prompt'"),
        ({"question": "x"}, {"columns": {"prompt": "qestion"}}, r"Did you mean 'question'"),
        ({"a": "x"}, {"columns": {"promt": "a"}}, r"'promt' is not a column that jaxtune knows.*Did you mean 'prompt'"),
        ({"text": "x"}, {"format": "txt"}, r"unknown format 'txt'.*Did you mean 'text'"),
        ({"q": "x"}, {"template": "{p}"}, r"no column 'p'.*Columns found: q"),
        ({"q": "x"}, {"template": "nothing"}, r"no placeholder"),
        ({"q": "x"}, {"template": "{q"}, r"data.template"),
        ({"text": "x"}, {"system": "y"}, r"data.system has no effect"),
        ({"prompt": "x", "completion": "y"}, {"completion_from": "z"}, r"data.completion_from has no effect"),
        ({"text": None}, {}, r"a\.jsonl:1: column 'text' is null, expected text"),
        ({"text": ["x"]}, {}, r"column 'text' is a list, expected text"),
        ({"messages": "x"}, {}, r"column 'messages' is not JSON"),
        ({"messages": []}, {}, r"column 'messages' is an empty list"),
        ({"messages": ["x"]}, {}, r"message 1: expected an object with role and content, found text"),
        ({"messages": [{"content": "x"}]}, {}, r"message 1: no role. Fields found: content;"),
        (
            {"messages": [user("x"), {"role": "asistant", "content": "x"}]},
            {},
            r"a\.jsonl:1, message 2: unknown role 'asistant'.*'assistant'",
        ),
        ({"messages": [{"role": "user"}]}, {}, r"message 1 \(user\): content is null"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, {}, r"a function_call is not JSON"),
        ({"conversations": [{"from": "function_call", "value": '{"x": 1}'}]}, {}, r"a tool call needs a name"),
        ({"messages": [user("x")], "tools": "nope"}, {}, r"column 'tools' is not JSON"),
    ],
)
def test_rows_that_do_not_fit(convert, row, settings, message):
    with pytest.raises(UserError, match=message):
        convert(row, **settings)


def test_a_column_missing_from_a_later_row(convert):
    with pytest.raises(UserError, match=r"a\.jsonl:2: no column 'completion'. Columns found: prompt, completions"):
        convert({"prompt": "x", "completion": "y"}, {"prompt": "x", "completions": "y"})


def test_a_column_of_mixed_types(tmp_path):
    rows = [{"text": None, "n": 1}, {"text": "x", "n": 2.5}, {"text": 7, "n": 3}]
    source = read(write_jsonl(tmp_path / "a.jsonl", rows))
    types = ColumnTypes(source, ("text", "n"))
    numbered = list(source)
    for number, row in numbered[:2]:
        types.check(number, row)
    with pytest.raises(UserError, match=r"a\.jsonl:3: column 'text' is a number \(7\), but text at .*a\.jsonl:2"):
        types.check(*numbered[2])


def test_the_digest_sees_the_columns_in_use_only(tmp_path):
    source = read(
        write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "id": 1}, {"id": 2, "text": "x"}, {"id": 1, "text": "y"}])
    )
    reader = make_reader(source)
    a, b, c = (reader.digest(row) for _, row in source)
    assert a == b != c


@pytest.mark.parametrize(
    "row", [["plain", "more"], ['"quoted"\n\\ é 😀 \u2028', "\ud800"], [None, "x"], [1, [{"b": 2, "a": 1}]]]
)
def test_a_digest_is_that_of_the_canonical_json(row):
    columns = ("a", "b")
    reader = Reader("text", columns, lambda where, row: row)
    text = json.dumps(row, sort_keys=True).encode("utf-8", "surrogatepass")
    want = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    assert reader.digest(dict(zip(columns, row))) == want
