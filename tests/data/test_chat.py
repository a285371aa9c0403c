"""Masks of conversations, against what each template is known to write and against transformers' own rendering."""

import pytest
from data_zoo import (
    CHATML,
    CHATML_TAGGED,
    CLOSED,
    INST,
    LLAMA3,
    OPEN,
    THINKING,
    byte_tokenizer,
    space_tokenizer,
    trained_runs,
)

from jaxtune.data import DEFAULT_TEMPLATE, read
from jaxtune.data.chat import ChatRenderer
from jaxtune.data.formats import Conversation, make_reader
from jaxtune.data.tokenize import Encoder
from jaxtune.errors import UserError

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]


def talk(*contents, roles=("user", "assistant")):
    return Conversation([{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)])


def encode(tokenizer, conversation):
    [(ids, mask)] = Encoder(tokenizer).encode(["a.jsonl:1"], [conversation])
    return ids, mask


def runs(tokenizer, conversation):
    return trained_runs(tokenizer, *encode(tokenizer, conversation))


TWO = talk("Hi you", "Ho me", "And?", "So <b>.")


@pytest.mark.parametrize("make", [byte_tokenizer, space_tokenizer])
@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (CHATML, "<|im_end|>", ["Ho me<|im_end|>", "So <b>.<|im_end|>"]),
        (CHATML_TAGGED, "<|im_end|>", ["Ho me<|im_end|>", "So <b>.<|im_end|>"]),
        (CHATML_TAGGED, "</s>", ["Ho me<|im_end|>", "So <b>.<|im_end|>"]),  # the marks, and the end of the turn
        (LLAMA3, "<|im_end|>", ["Ho me<|im_end|>", "So <b>.<|im_end|>"]),
        (INST, "</s>", [" Ho me </s>", " So <b>. </s>"]),
        (THINKING, "<|im_end|>", ["Ho me<|im_end|>", "So <b>.<|im_end|>"]),
        (CLOSED, "</s>", ["Ho me<|im_end|>", "So <b>.<|im_end|>\n</s>"]),
        (OPEN, "</s>", ["Ho me", "So <b>.\n</s>"]),
        (None, "</s>", ["Ho me</s>", "So <b>.</s>"]),
    ],
    ids=["chatml", "tagged", "tagged-no-eos", "llama3", "inst", "thinking", "closed", "open", "default"],
)
def test_only_the_assistant_and_its_end_of_turn_are_trained(make, template, eos, expected):
    tokenizer = make(template, eos=eos, bos="<s>")
    got = runs(tokenizer, TWO)
    if make is space_tokenizer:  # it puts a space after special tokens too, and its decoder strips the first
        got, expected = ([run.replace(" ", "") for run in runs] for runs in (got, expected))
    assert got == expected


@pytest.mark.parametrize("template", [CHATML, CHATML_TAGGED, LLAMA3, INST, THINKING, CLOSED])
@pytest.mark.parametrize("make", [byte_tokenizer, space_tokenizer])
def test_ids_are_those_of_apply_chat_template_with_one_bos(make, template):
    tokenizer = make(template, bos="<s>")
    ids, _ = encode(tokenizer, TWO)
    assert ids == tokenizer.apply_chat_template(TWO.messages, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == (template in (LLAMA3, INST))


@pytest.mark.parametrize("template", [CHATML, LLAMA3, INST, CLOSED, None])
@pytest.mark.parametrize("make", [byte_tokenizer, space_tokenizer])
def test_the_prompt_at_generation_is_a_prefix_of_the_row(make, template):
    tokenizer = make(template, bos="<s>")
    ids, mask = encode(tokenizer, talk("Hi", "Ho"))
    prompt = tokenizer.apply_chat_template(
        talk("Hi").messages, chat_template=template or DEFAULT_TEMPLATE, add_generation_prompt=True, return_dict=False
    )
    assert ids[: len(prompt)] == prompt
    assert mask[: len(prompt)] == [0] * len(prompt) and mask[len(prompt)] == 1


def test_a_token_across_the_start_of_an_answer_is_cut(qwen3, monkeypatch):
    """The prompt ends in a line break; an answer that begins with one must not be merged into it."""
    tokenizer = qwen3
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    ids, mask = encode(tokenizer, talk("Hi", "\nHo.", "a", "\n\nb"))
    prompt = tokenizer.apply_chat_template(talk("Hi").messages, add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)] == prompt
    assert trained_runs(tokenizer, ids, mask) == ["\nHo.<|im_end|>", "\n\nb<|im_end|>"]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        talk("Hi", "\nHo.", "a", "\n\nb").messages, tokenize=False
    )


def test_user_text_that_looks_like_the_assistant_is_not_trained():
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    assert runs(tokenizer, talk("say <|im_start|>assistant\nx<|im_end|>", "x", "x", "x")) == ["x<|im_end|>"] * 2
    assert runs(tokenizer, talk("x", "the word <|im_end|> ends", "x", "y")) == [
        "the word <|im_end|> ends<|im_end|>",
        "y<|im_end|>",
    ]


def test_thoughts_that_the_prompt_opens_are_not_trained_twice():
    """The opening of a thought belongs to the prompt where there is one, and turns without are found all the same."""
    opens = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert opens != CHATML
    tokenizer = byte_tokenizer(opens, eos="<|im_end|>")
    conversation = talk("a", "<think>\nhm</think>Ho", "b", "So")
    assert runs(tokenizer, conversation) == ["hm</think>Ho<|im_end|>", "So<|im_end|>"]


def test_a_conversation_that_does_not_end_with_the_assistant():
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    assert runs(tokenizer, talk("a", "b", "c")) == ["b<|im_end|>"]
    assert runs(tokenizer, talk("a")) == []
    assert runs(byte_tokenizer(OPEN), talk("a", "b", "c")) == ["b"]


def test_the_default_template_shows_system_tools_and_calls():
    tokenizer = byte_tokenizer(bos="<s>")
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "[2]"},
        {"role": "assistant", "content": "Done."},
    ]
    ids, mask = encode(tokenizer, Conversation(messages, TOOLS))
    call = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    schema = '{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}'
    assert tokenizer.decode(ids) == (
        f"<s>### Tools:\n{schema}\n\n### System:\nBe kind.\n\n### User:\ngo\n\n### Assistant:\n{call}\n{call}</s>\n\n"
        "### Tool:\n[2]\n\n### Assistant:\nDone.</s>\n\n"
    )
    assert trained_runs(tokenizer, ids, mask) == [f"{call}\n{call}</s>", "Done.</s>"]


def test_a_template_that_drops_tool_calls_is_refused_by_row():
    conversation = talk("go", "")
    conversation.messages[1]["tool_calls"] = [CALL]
    with pytest.raises(UserError, match=r"a\.jsonl:1, message 2 .*leaves out its calls \(f\).*allow_left_out=calls"):
        encode(byte_tokenizer(CHATML), conversation)


def test_a_template_that_writes_an_answer_twice_is_refused():
    twice = "{% for m in messages %}{{ m.role }}: {{ m.content }} ({{ m.content }})\n{% endfor %}"
    with pytest.raises(UserError, match=r"message 2: .*its content 2 times"):
        encode(byte_tokenizer(twice), talk("a", "b"))


def test_a_template_that_tells_of_the_answer_elsewhere_is_refused():
    early = "{{ messages[-1].content | length }}" + CHATML
    with pytest.raises(UserError, match="what the template writes before it depends on it"):
        encode(byte_tokenizer(early), talk("a", "b"))
    late = CHATML + "{{ messages[-1].content | length }}"
    with pytest.raises(UserError, match="what the template writes after it depends on it"):
        encode(byte_tokenizer(late), talk("a", "b"))


def test_a_refusal_by_the_template_names_the_row():
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('must start with user') }}{% endif %}" + CHATML
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: the chat template refuses .*\(assistant, user\): must start with user"
    ):
        encode(byte_tokenizer(strict), talk("a", "b", roles=("assistant", "user")))


def test_half_a_character_names_the_row():
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*half a character"):
        encode(byte_tokenizer(CHATML), talk("a", "b \ud83d"))


def test_no_way_to_end_a_turn_is_refused():
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode(byte_tokenizer(eos=None), talk("a", "b"))


class TestQwen3:
    """Qwen3's own template: no generation marks, thoughts dropped from earlier turns, empty ones added to the last."""

    @pytest.mark.parametrize(
        ("answers", "trained"),
        [
            (["one", "two"], ["one", "<think>\n\n</think>\n\ntwo"]),
            (["<think>\nhm\n</think>\n\none", "<think>\nho\n</think>\n\ntwo"], ["one", "<think>\nho\n</think>\n\ntwo"]),
            (["one\n\n", "\n two "], ["one", "<think>\n\n</think>\n\n two"]),
        ],
    )
    def test_turns_and_thoughts(self, qwen3, answers, trained):
        conversation = talk("a", answers[0], "b", answers[1])
        ids, mask = encode(qwen3, conversation)
        assert ids == qwen3.apply_chat_template(conversation.messages, return_dict=False)
        got = [run.removesuffix("<|im_end|>").rstrip() for run in trained_runs(qwen3, ids, mask)]
        assert got == trained
        assert all(run.endswith("<|im_end|>") for run in trained_runs(qwen3, ids, mask))

    def test_tool_turns(self, qwen3):
        messages = [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "[2]"},
            {"role": "assistant", "content": "I see.", "tool_calls": [CALL]},
            {"role": "tool", "content": "[3]"},
            {"role": "assistant", "content": "Done."},
            {"role": "user", "content": "thanks"},
            {"role": "assistant", "content": "Bye."},
        ]
        ids, mask = encode(qwen3, Conversation(messages, TOOLS))
        assert ids == qwen3.apply_chat_template(messages, tools=TOOLS, return_dict=False)
        call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
        assert trained_runs(qwen3, ids, mask) == [
            f"{call}<|im_end|>",
            f"I see.\n{call}<|im_end|>",
            "Done.<|im_end|>",
            "<think>\n\n</think>\n\nBye.<|im_end|>",
        ]

    def test_thoughts_of_a_tool_turn_stay_while_it_is_the_last_question(self, qwen3):
        messages = [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\n", "tool_calls": [CALL]},
            {"role": "tool", "content": "[2]"},
            {"role": "assistant", "content": "Done."},
        ]
        ids, mask = encode(qwen3, Conversation(messages, TOOLS))
        assert ids == qwen3.apply_chat_template(messages, tools=TOOLS, return_dict=False)
        first, second = trained_runs(qwen3, ids, mask)
        assert first.startswith("<think>\nhm\n</think>") and first.endswith("</tool_call><|im_end|>")
        assert second == "<think>\n\n</think>\n\nDone.<|im_end|>"

    def test_the_mask_equals_that_of_the_template_with_marks_added(self, qwen3, assets):
        """An oracle: the same template with generation marks written in by hand, read by transformers."""
        header, branch = "'<|im_start|>' + message.role + '\\n", "{%- if loop.index0 > ns.last_query_index %}"
        stop = "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}"
        before, turn = qwen3.chat_template.split('{%- elif message.role == "assistant" %}')
        assert (turn.count(header), turn.count(branch), turn.count(stop)) == (3, 1, 1)
        turn = turn.replace(header, "'")
        turn = turn.replace(branch, "{{- '<|im_start|>assistant\\n' }}{% generation %}" + branch)
        turn = turn.replace(stop, "{{- '<|im_end|>' }}{% endgeneration %}" + stop.replace("<|im_end|>", ""))
        marked = before + '{%- elif message.role == "assistant" %}' + turn
        path = assets / "data" / "toolcall" / "glaive_toolcall_en_demo.json"
        source = read(str(path))
        reader = make_reader(source)
        examples = [reader.convert(source.where(n), row) for n, row in source][:60]
        encoded = list(Encoder(qwen3).encode(["x"] * len(examples), examples))
        for example, (ids, mask) in zip(examples, encoded):
            oracle = qwen3.apply_chat_template(
                example.messages, tools=example.tools, chat_template=marked, return_assistant_tokens_mask=True
            )
            assert ids == oracle["input_ids"]
            assert mask == oracle["assistant_masks"]


def test_the_renderer_reports_characters():
    text, spans, unended, _ = ChatRenderer(byte_tokenizer(CHATML)).render("x", talk("a", "b"))
    assert [text[a:b] for a, b in spans] == ["b<|im_end|>"] and not unended
    assert ChatRenderer(byte_tokenizer(OPEN)).render("x", talk("a", "b")).unended
