"""Masks of conversations against TRL's templates, and against the rendering of prefixes; what they cost."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from data_zoo import CHATML, INST, LLAMA3, OPEN, byte_tokenizer, trained_runs

from jaxtune.data.chat import DEFAULT_TEMPLATE, ChatRenderer
from jaxtune.data.formats import Conversation
from jaxtune.data.tokenize import Encoder

TEMPLATES = Path(__file__).parent / "templates"
SPEC = importlib.util.find_spec("trl")
TRL = Path(SPEC.origin).parent / "chat_templates" if SPEC else Path("nowhere")
SPECIAL = re.compile(r"<[|｜][^<>{}'\"\s]+?[|｜]>|<(?:start|end)_of_turn>|<sop>|\[gMASK\]|<turn\|>|<\|turn>")
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ASK = {"role": "user", "content": "Hi you"}
TURNS = [ASK, {"role": "assistant", "content": "Ho me"}, {"role": "user", "content": "And?"}]
CONVERSATIONS = {
    "turns": [*TURNS, {"role": "assistant", "content": "So <b>."}],
    "system": [{"role": "system", "content": "Be kind."}, *TURNS[:2]],
    "thoughts": [ASK, {"role": "assistant", "content": "Ho me", "reasoning_content": "mull over"}],
    "calls": [
        *[ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        *[{"role": "tool", "name": "f", "content": "[2]"}, {"role": "assistant", "content": "Done."}],
    ],
}


def tokenizer_of(name):
    template = (TRL / name).read_text(encoding="utf-8")
    tokenizer = byte_tokenizer(template, bos="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(template)))})
    return tokenizer


def ours(tokenizer, messages):
    everything = ("thoughts", "answers", "calls")
    [(ids, mask)] = Encoder(tokenizer, everything).encode(["a.jsonl:1"], [Conversation(messages)])
    return ids, mask


def theirs(tokenizer, messages):
    """As TRL's SFTTrainer has it with assistant_only_loss; None where the template refuses the conversation."""
    try:
        found = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    except Exception:  # a template may raise anything
        return None
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.skipif(SPEC is None, reason="trl is not installed")
@pytest.mark.parametrize("name", sorted(path.name for path in TRL.glob("*_training.jinja")))
def test_marked_templates_give_trls_masks(name):
    if name.startswith(("idefics", "smolvlm", "llava")):
        pytest.skip("of images: their messages are lists of parts")
    tokenizer, compared = tokenizer_of(name), 0
    for messages in CONVERSATIONS.values():
        if (found := theirs(tokenizer, messages)) is not None:
            assert ours(tokenizer, messages) == found
            compared += 1
    assert compared


# Templates without marks: TRL trains by the marks that it puts into a copy of them. The differences, all of them: the
# line break behind the end of a turn is no part of ours, nor is a header that the model is given when it is asked.
@pytest.mark.skipif(SPEC is None, reason="trl is not installed")
@pytest.mark.parametrize(
    ("name", "given"),
    [
        *[
            (name, "")
            for name in ("gemma", "gemma3", "lfm2", "llama3", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl")
        ],
        ("qwen2_5", "\n"),
        *[("gptoss", "<|start|>assistant"), ("deepseekv3", "<｜Assistant｜>")],
        *[(f"nemotron_3_{size}", "<think>") for size in ("nano", "super", "ultra")],
        ("qwen3_8", "<think>\n"),
    ],
)
def test_templates_without_marks_give_trls_masks_but_for_what_is_given(name, given):
    trained, plain = tokenizer_of(f"{name}_training.jinja"), tokenizer_of(f"{name}.jinja")
    for kind in ("turns", "system"):
        if (found := theirs(trained, CONVERSATIONS[kind])) is None:
            continue
        ids, mask = ours(plain, CONVERSATIONS[kind])
        expected = [run.removeprefix(given).removesuffix("\n") for run in trained_runs(trained, *found)]
        assert trained_runs(plain, ids, mask) == expected
        assert plain.decode(ids) == trained.decode(found[0])


@pytest.mark.skipif(SPEC is None, reason="trl is not installed")
def test_calls_and_thoughts_without_marks():
    """A thought that the prompt opens is closed by the model; a call is trained from its first token."""
    plain = tokenizer_of("nemotron_3_nano.jinja")
    call = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>\n<|im_end|>"
    assert trained_runs(plain, *ours(plain, CONVERSATIONS["calls"])) == [f"</think>\n{call}", "</think>Done.<|im_end|>"]
    plain = tokenizer_of("gptoss.jinja")
    thought = "<|channel|>analysis<|message|>mull over<|end|><|start|>assistant"
    assert trained_runs(plain, *ours(plain, CONVERSATIONS["thoughts"])) == [
        f"{thought}<|channel|>final<|message|>Ho me<|return|>"
    ]
    # Of calls these templates write the name once more, behind their answer.
    final = "<|channel|>final<|message|>Done.<|return|>"
    called = ' to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>'
    assert trained_runs(plain, *ours(plain, CONVERSATIONS["calls"])) == [called, final]
    repeated = [ASK, {"role": "assistant", "content": "Ho", "reasoning_content": "Hi you"}]
    thought = "<|channel|>analysis<|message|>Hi you<|end|><|start|>assistant"
    assert trained_runs(plain, *ours(plain, repeated)) == [f"{thought}<|channel|>final<|message|>Ho<|return|>"]
    plain = tokenizer_of("diffusion_gemma.jinja")
    assert trained_runs(plain, *ours(plain, CONVERSATIONS["calls"]))[0].startswith(
        "<|tool_call>call:f{x:1}<tool_call|>"
    )
    plain = tokenizer_of("glm4moe.jinja")  # TRL writes <|user|> behind the last turn, we write EOS
    assert trained_runs(plain, *ours(plain, CONVERSATIONS["turns"])) == [
        "\n<think></think>\nHo me<|user|>",
        "\n<think></think>\nSo <b>.</s>",
    ]


ODD = ["e\u0301", "\u0301x", "\U0001f469\u200d\U0001f467\U0001f3fd", "", " ", "\n", "  lead", "trail \n\n", "\tx\n\ty"]
ODD += [
    "a\u2028b\u00a0c",
    "\u05e9\u05dc",
    "x\x00y",
    "assistant",
    "user\n",
    "<|im_end",
    "{{ m }}",
    "{% raw %}",
    "a" * 500,
]
ODD += ["\r\nx\r\n", "2", "<b>&amp;</b>", "None", "\u212b", "\\n \\u00e9 \"q\" 'q'", "<think>", "<think>\n\n</think>"]
ODD += ["a" * 500, "###", "\ud55c\uad6d \ubb38\uc7a5", "\u0661\u0662", "Hi", "because " * 300]


def odd(rng):
    """A conversation of turns that are empty, of marks, of letters that are joined, as long as may be."""
    messages = [{"role": "system", "content": str(rng.choice(ODD))}][: int(rng.random() < 0.3)]
    for _ in range(int(rng.integers(1, 5))):
        messages.append({"role": "user", "content": str(rng.choice(ODD))})
        turn = {"role": "assistant", "content": str(rng.choice(ODD))}
        if rng.random() < 0.3:
            turn["reasoning_content"] = str(rng.choice(ODD))
        if rng.random() < 0.2:
            value = [str(rng.choice(ODD)), 1.5, None, True, ["a", {"b": 2}], {}][int(rng.integers(6))]
            call = {"type": "function", "function": {"name": "f", "arguments": {"k": value}}}
            messages += [turn | {"content": "", "tool_calls": [call]}, {"role": "tool", "name": "f", "content": "Hi"}]
        messages.append(turn)
    return messages


@pytest.mark.skipif(SPEC is None, reason="trl is not installed")
@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3", "gptoss", "phi3", "nemotron_3_nano", "glm4moe"])
def test_odd_conversations_give_trls_masks(name):
    tokenizer, rng, compared = tokenizer_of(f"{name}_training.jinja"), np.random.default_rng(len(name)), 0
    for _ in range(25):
        if (found := theirs(tokenizer, messages := odd(rng))) is not None:
            assert ours(tokenizer, messages) == found, messages
            compared += 1
    assert compared > 15


@pytest.mark.skipif(SPEC is None, reason="trl is not installed")
@pytest.mark.parametrize(
    ("name", "given"),
    [("gemma3", ""), ("llama3", ""), ("phi3", ""), ("qwen2_5", "\n"), ("gptoss", "<|start|>assistant")],
)
def test_odd_conversations_without_marks_give_trls_masks_but_for_what_is_given(name, given):
    trained, plain = tokenizer_of(f"{name}_training.jinja"), tokenizer_of(f"{name}.jinja")
    rng, compared = np.random.default_rng(7), 0
    for _ in range(25):
        if (found := theirs(trained, messages := odd(rng))) is None:
            continue
        ids, mask = ours(plain, messages)
        expected = [run.removeprefix(given).removesuffix("\n") for run in trained_runs(trained, *found)]
        assert plain.decode(ids) == trained.decode(found[0])
        assert trained_runs(plain, ids, mask) == expected, messages
        compared += 1
    assert compared > 5


# ------------------------------------------------------------------------------------- the rendering of prefixes

PREFIXED = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "inst": INST,
    "open": OPEN,
    "default": None,
    "gemma": (TEMPLATES / "gemma.jinja").read_text(),
    "next_role": (TEMPLATES / "next_role.jinja").read_text(),
}
WORDS = [
    "x",
    "a",
    "Hi",
    "b <|im_end|> c",
    "user",
    "say <|im_start|>assistant\nx",
    "### Assistant:\ny",
    "1\n2",
    "z [INST] z",
]
WORDS += ["q<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nr", "assistant: k"]


@pytest.mark.parametrize("name", PREFIXED)
def test_spans_equal_the_rendering_of_prefixes(name):
    """143 random conversations for each of seven templates whose prefixes render to prefixes."""
    tokenizer = byte_tokenizer(PREFIXED[name], bos="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|observation|>"]})
    renderer, rng = ChatRenderer(tokenizer), np.random.default_rng(len(name))

    def render(messages, prompt=False):
        return tokenizer.apply_chat_template(
            messages, chat_template=PREFIXED[name] or DEFAULT_TEMPLATE, add_generation_prompt=prompt, tokenize=False
        )

    for _ in range(143):
        turns = 2 * int(rng.integers(1, 7))
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": str(rng.choice(WORDS))} for i in range(turns)]
        text, spans, unended, _ = renderer.render("a.jsonl:1", Conversation(messages))
        assert text == render(messages)
        expected = []
        for i in range(1, turns, 2):
            start = len(render(messages[:i], True))
            end = len(render(messages[: i + 1]).rstrip())
            if name == "next_role" and i + 1 < turns:
                end = text.index("<|user|>", end) + len("<|user|>")
            expected.append((start, len(text) if unended and i + 1 == turns else end))
        assert spans == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA3, None, PREFIXED["next_role"]])
def test_a_long_conversation_costs_few_renderings(template, monkeypatch):
    tokenizer = byte_tokenizer(template, bos="<s>")
    rendered = []
    render = type(tokenizer).apply_chat_template

    def counted(self, *args, **kwargs):
        rendered.append(len(text := render(self, *args, **kwargs)))
        return text

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(160)]
    messages[2:2] = [{"role": "assistant", "content": ""}, {"role": "tool", "content": "[2]"}]
    text, spans, *_ = ChatRenderer(tokenizer).render("a.jsonl:1", Conversation(messages))
    assert len(spans) == 81
    assert sum(rendered) <= 2.2 * len(text) and len(rendered) <= 8
