"""Code of others that never ends is stopped, in any thread, and a template above all."""

import signal
import threading
import time

import pytest
import test_export

from jaxtune.data import chat
from jaxtune.data.formats import Conversation
from jaxtune.errors import UserError
from jaxtune.infer.generation import encode_prompts
from jaxtune.limits import TooLong, time_limit


def forever():
    while True:
        pass


def stopped(found):
    with pytest.raises(TooLong, match=r"the loop took more than 0.1 s"), time_limit(0.1, "the loop"):
        forever()
    found.append(True)


def test_a_loop_is_stopped_in_every_thread():
    found, before = [], signal.getsignal(signal.SIGALRM)
    stopped(found)
    other = threading.Thread(target=stopped, args=(found,), daemon=True)
    other.start()
    other.join(10)
    assert len(found) == 2
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_ends_in_time_is_left_alone():
    with time_limit(0.05, "it"):
        pass
    time.sleep(0.1)


LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}"
LOOPS += "{% endfor %}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)
CONVERSATION = Conversation([{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}])


@pytest.mark.security
def test_a_template_that_never_ends(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    test_export.write_tokenizer(tmp_path, LOOPS)
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.2)
    with pytest.raises(UserError, match="Prompt 1: the chat template refuses this conversation: it took more than"):
        encode_prompts(AutoTokenizer.from_pretrained(tmp_path), ["w1"], chat=True)


@pytest.mark.security
@pytest.mark.parametrize(
    ("last", "said"),
    [
        (LOOPS, "fails with its generation marks: it took more than 0.2 s"),
        ("{{ raise_exception('no') }}", "fails with its generation marks: no"),
    ],
)
def test_a_template_that_fails_only_where_its_marks_are_looked_for(last, said, tmp_path, monkeypatch):
    """It is rendered for them with another text of special tokens than by the tokenizer."""
    from transformers import AutoTokenizer

    test_export.write_tokenizer(tmp_path, MARKED)
    tokenizer, times = AutoTokenizer.from_pretrained(tmp_path), []
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.2)
    renderer = chat.ChatRenderer(tokenizer)
    whole = renderer.render("rows:1", CONVERSATION)
    assert [whole.text[a:b] for a, b in whole.spans] == ["w2</s>"]
    monkeypatch.setattr(renderer, "template", lambda tools=None: times.append(1) or MARKED + last)
    with pytest.raises(UserError, match=f"rows:1: the chat template {said}"):
        renderer._tagged_spans("rows:1", whole.text, CONVERSATION.messages, None)
    assert times
