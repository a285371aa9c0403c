"""Conversations through a chat template, with the characters that are trained.

Only what the assistant says is trained, with the token that ends its turn. Most templates do not mark these parts
(`{% generation %}`), and the rendering of a prefix of a conversation is often not a prefix of its rendering (Qwen3
drops the thoughts of earlier turns and adds empty ones to the last). So each assistant's turn is found by rendering the
conversation once more with a marker in that turn: what follows the marker also follows the turn in the real text.

    ...<|im_start|>assistant\\n  Paris.    <|im_end|>\\n<|im_start|>user\\n...      the real text
    ...<|im_start|>assistant\\n  MARKER    <|im_end|>\\n<|im_start|>user\\n...      the tail is the same
                                trained-------------^
"""

import re

from jaxtune.data.formats import Conversation
from jaxtune.errors import UserError

# Used where a tokenizer has no chat template, and exported with the tuned model. Plain text, for any vocabulary.
DEFAULT_TEMPLATE = """\
{{- bos_token if bos_token else '' -}}
{%- if tools -%}
{{- '### Tools:\\n' -}}
{%- for tool in tools -%}{{- (tool | tojson) + '\\n' -}}{%- endfor -%}
{{- '\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '### Assistant:\\n' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{{- ('\\n' if message.content or not loop.first else '') + '<tool_call>' + (call.function | tojson) + '</tool_call>' -}}
{%- endfor -%}
{{- (eos_token if eos_token else '') + '\\n\\n' -}}
{%- else -%}
{{- '### ' + (message.role | capitalize) + ':\\n' + message.content + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{{- '### Assistant:\\n' if add_generation_prompt else '' -}}
"""

_MARKER = "jxMARKERxj"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template, or DEFAULT_TEMPLATE where it has none.

    `render(where, conversation)` returns the text, the trained spans (start, end) in characters, in order, and whether
    the last turn is the assistant's and the template writes nothing after it, which leaves its end to the EOS token.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.own = bool(tokenizer.chat_template)
        self._opening: str | None = None

    def template(self, tools: list[dict] | None = None) -> str:
        return self.tokenizer.get_chat_template(tools=tools) if self.own else DEFAULT_TEMPLATE

    def render(self, where: str, conversation: Conversation) -> tuple[str, list[Span], bool]:
        messages, tools = conversation.messages, conversation.tools
        text = self._render(where, messages, tools)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            return text, [], False
        if _GENERATION.search(self.template(tools)):
            spans = self._tagged_spans(where, text, messages, tools)
            _, closing = self._around_marker(where, messages, tools, turns[-1])
        else:
            spans, end = [], 0
            for i in turns:
                start, end, closing = self._span(where, text, messages, tools, i, end)
                spans.append((start, end))
        return text, spans, turns[-1] == len(messages) - 1 and not closing.strip()

    def _render(self, where: str, messages: list[dict], tools: list[dict] | None, prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=None if self.own else DEFAULT_TEMPLATE,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        except Exception as error:  # a template may raise anything: jinja2's errors, TypeError from its expressions
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(f"{where}: the chat template refuses this conversation ({roles}): {error}") from None

    def _opening_text(self, where: str) -> str:
        """What `add_generation_prompt` adds: the part of an assistant's turn that the model is given."""
        if self._opening is None:
            user = [{"role": "user", "content": "x"}]
            bare, prompted = self._render(where, user, None), self._render(where, user, None, prompt=True)
            shared = bare if prompted.startswith(bare) else _common(self.tokenizer, prompted, bare)
            self._opening = prompted[len(shared) :]
        return self._opening

    def _span(self, where, text: str, messages: list[dict], tools, i: int, after: int) -> tuple[int, int, str]:
        """Return where the trained characters of message i start and end, and what the template closes the turn with.

        The assistant's turn before ends at `after`.
        """
        before, tail = self._around_marker(where, messages, tools, i)
        if not text.endswith(tail):
            raise self._lost(where, i, "what the template writes after it depends on it")
        closing = tail
        if i + 1 < len(messages):
            _, alone = self._around_marker(where, messages[: i + 1], tools, i)
            closing = alone if tail.startswith(alone.rstrip()) else _common(self.tokenizer, alone, tail)
        end = len(text) - len(tail) + len(closing.rstrip())

        opening = self._opening_text(where)
        at = before.rfind(opening, after)
        if not opening.strip():
            start = len(before.rstrip())
        elif at >= 0:
            start = at + len(opening)
        else:  # the template opens with thoughts only when it prompts: take as much of the opening as stands there
            fits = max((k for k in range(len(opening)) if before.endswith(opening[:k])), default=0)
            start = len(before) if fits else len(before.rstrip())
            if fits and text.startswith(opening, start - fits):  # the answer itself begins with such thoughts
                start += len(opening) - fits
        if not text.startswith(before[:start]) or not after <= start <= end:
            raise self._lost(where, i, "what the template writes before it depends on it")
        return start, end, closing

    def _around_marker(self, where, messages: list[dict], tools, i: int) -> tuple[str, str]:
        """Render with a marker as the content of message i (with tool calls: as the name of the last) and cut there."""
        marked = dict(messages[i])
        if marked.get("tool_calls"):
            *calls, last = marked["tool_calls"]
            function = {**last["function"], "name": _MARKER}
            marked["tool_calls"] = [*calls, {**last, "function": function}]
        else:
            marked["content"] = _MARKER
        text = self._render(where, [*messages[:i], marked, *messages[i + 1 :]], tools)
        before, *tails = text.split(_MARKER)
        if len(tails) != 1:
            what = "tool calls" if marked.get("tool_calls") else "content"
            raise self._lost(where, i, f"the template writes its {what} {len(tails)} times")
        return before, tails[0]

    def _tagged_spans(self, where, text: str, messages: list[dict], tools) -> list[Span]:
        """The template's own marks, each extended over the end-of-sequence token where that follows directly."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, marks = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.template(tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        if rendered[0] != text:
            raise UserError(f"{where}: the chat template renders differently with its generation marks.")
        eos = self.tokenizer.eos_token or ""
        return [(start, end + len(eos) if eos and text.startswith(eos, end) else end) for start, end in marks[0]]

    def _lost(self, where: str, i: int, reason: str) -> UserError:
        return UserError(
            f"{where}, message {i + 1}: cannot tell which tokens of the chat template's output are the assistant's: "
            f"{reason}. Give a template with {{% generation %}} marks as model.chat_template."
        )


def _common(tokenizer, a: str, b: str) -> str:
    """Return the text of the tokens with which both `a` and `b` begin."""
    ids_a, ids_b = (tokenizer(t, add_special_tokens=False, return_offsets_mapping=True) for t in (a, b))
    end = 0
    for x, y, (_, stop) in zip(ids_a["input_ids"], ids_b["input_ids"], ids_a["offset_mapping"]):
        if x != y:
            break
        end = stop
    return a[:end]
