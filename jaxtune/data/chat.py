"""Conversations through a chat template, with the characters that are trained.

Only what the assistant says is trained, with the token that ends its turn. Most templates do not mark these parts
(`{% generation %}`), and the rendering of a prefix of a conversation is often not a prefix of its rendering (Qwen3
drops the thoughts of earlier turns and adds empty ones to the last). So the conversation is rendered once more with a
marker in each turn of the assistant: the text between the markers is also the text between the turns.

    ...<|im_start|>assistant\\n  Paris.    <|im_end|>\\n<|im_start|>user\\n...      the real text
    ...<|im_start|>assistant\\n  MARKER    <|im_end|>\\n<|im_start|>user\\n...      the tail is the same
                                trained-------------^

Where the two can be aligned in several ways, or in none, turns are marked one at a time. A turn ends with a
special token: its own, or that of the next role where the template writes no other (GLM).

The text is then compared with the messages: what the template left out is counted, or an error if it was to be trained.
"""

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxtune.data.formats import Conversation
from jaxtune.data.messages import Notes
from jaxtune.errors import UserError
from jaxtune.limits import time_limit

# Used where a tokenizer has no chat template, and exported with the tuned model. Plain text, for any vocabulary.
TEMPLATE_SECONDS = 10  # for one conversation; a template is a program, which may never end
DEFAULT_TEMPLATE = """\
{{- bos_token if bos_token else '' -}}
{%- if tools -%}
{{- '### Tools:\\n' -}}
{%- for tool in tools -%}{{- (tool | tojson) + '\\n' -}}{%- endfor -%}
{{- '\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '### Assistant:\\n' -}}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' if message.reasoning_content else '' -}}
{{- message.content or '' -}}
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

# What a template may leave out of a turn that is trained, if data.allow_left_out names it.
TRAINED_PARTS = ("answers", "calls", "thoughts")

_MARKER, _THOUGHT = "jxMARKERxj", "jxTHOUGHTxj"
_NUMBERED = re.compile(r"jxMARKER(\d+)xj")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "reasoning_content", "name", "id")
# How known templates begin a message: text that contains one has been rendered already.
_RENDERED = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>)?\s*"
    r"(<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|\[gMASK\]|<\|(?:user|system|assistant)\|>)"
)
_THINK = re.compile(r"</?think")
_LEFT_OUT = "left out by the chat template"

Span = tuple[int, int]


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: what the template gives.
        spans: (start, end) of the trained characters, in order.
        unended: the last turn is the assistant's and no special token ends it; the encoder appends EOS.
        notes: what the template left out.
    """

    text: str
    spans: list[Span]
    unended: bool
    notes: Notes


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template, or DEFAULT_TEMPLATE where it has none.

    Args:
        tokenizer: a fast transformers tokenizer.
        allow_left_out: those of TRAINED_PARTS that the template may leave out of a turn that is trained.
    """

    def __init__(self, tokenizer, allow_left_out: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.own = bool(tokenizer.chat_template)
        self.allowed = frozenset(allow_left_out)
        if unknown := self.allowed - set(TRAINED_PARTS):
            raise UserError(f"data.allow_left_out: {min(unknown)!r} is none of {', '.join(TRAINED_PARTS)}.")
        self._opening: str | None = None
        self._around_user: tuple[str, str] | None = None
        self._closings: dict[str, str] = {}
        self._commons: dict[tuple[str, str], str] = {}
        self._reads: dict[tuple[str, bool], bool] = {}
        ends = set(special_tokens(tokenizer)) - ({tokenizer.bos_token} - {tokenizer.eos_token})
        self._special = re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or r"(?!)")
        self._ends = tuple(ends)

    def template(self, tools: list[dict] | None = None) -> str:
        return self.tokenizer.get_chat_template(tools=tools) if self.own else DEFAULT_TEMPLATE

    def render(self, where: str, conversation: Conversation) -> Rendered:
        """Render a conversation, and find its trained parts.

        Raises:
            UserError: the template refuses it, or leaves out what was to be trained; it is unclear which text is the
                assistant's; a message has been rendered before.
        """
        messages, tools = conversation.messages, conversation.tools
        for i, message in enumerate(messages):
            self._refuse_rendered(where, i, message)
        text = self._render(where, messages, tools)
        notes, turns = Notes(), [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            self._hold(where, text, conversation, [], notes)
            return Rendered(text, [], False, notes)
        tagged = bool(_GENERATION.search(self.template(tools)))
        try:
            found = self._turns(where, text, messages, tools, turns)
        except UserError:
            if not tagged or conversation.untrained:
                raise
            found = []
        spans = [(start, end) for start, end, _ in found]
        self._hold(where, text, conversation, spans, notes)
        if tagged:
            marks = self._tagged_spans(where, text, messages, tools)
            trained = _without(marks, [span for i, span in zip(turns, spans) if i in conversation.untrained])
            ended, closed = (self._is_ended(text[slice(*marks[-1])]), text[marks[-1][1] :]) if marks else (False, "")
        else:
            trained = [span for i, span in zip(turns, spans) if i not in conversation.untrained]
            ended, closed = self._is_ended(text[slice(*spans[-1])]), found[-1][2]
        last = bool(trained) and turns[-1] == len(messages) - 1 and turns[-1] not in conversation.untrained
        unended = last and not ended and not self._special.search(closed) and not (tagged and closed.strip())
        if unended:  # EOS comes after the text that closes the turn
            trained[-1] = (trained[-1][0], len(text))
        return Rendered(text, trained, unended, notes)

    def _render(self, where: str, messages: list[dict], tools: list[dict] | None, prompt: bool = False) -> str:
        try:
            with time_limit(TEMPLATE_SECONDS, "it"):
                return self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=None if self.own else DEFAULT_TEMPLATE,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
        except Exception as error:  # a template may raise anything: jinja2's errors, TypeError from its expressions
            roles = ", ".join(m["role"] for m in messages)
            hint = ""
            if messages[0]["role"] == "system" and "system" in str(error).lower():
                hint = " data.system_as_user=True puts the system message into the user's."
            raise UserError(f"{where}: the chat template refuses this conversation ({roles}): {error}.{hint}") from None

    def _refuse_rendered(self, where: str, i: int, message: dict) -> None:
        """Raise UserError for a message that holds a template's own marks around it."""
        content = message["content"]
        if not content:
            return
        found = _RENDERED.match(content)
        mark = found and found[1]
        if not mark and self.own:
            if self._around_user is None:
                text = self._render(where, [{"role": "user", "content": _MARKER}], None, prompt=True)
                before, _, after = text.partition(_MARKER)
                self._around_user = before.strip(), after.strip()
            before, after = self._around_user
            if len(before) > 1 and content.lstrip().startswith(before):
                mark = before
            elif len(after) > 1 and content.rstrip().endswith(after):
                mark = after
            elif message["role"] == "assistant" and content.rstrip().endswith(self._ends):
                mark = next(end for end in self._ends if content.rstrip().endswith(end))
        if mark:
            raise UserError(
                f"{where}, message {i + 1} ({message['role']}): a chat template was already applied to it ({mark!r}), "
                "and would be applied again. Give its text alone; or train on a prompt and its completion as they "
                "are with data.template='{prompt}{completion}'."
            )

    def _opening_text(self, where: str) -> str:
        """What `add_generation_prompt` adds: the part of an assistant's turn that the model is given."""
        if self._opening is None:
            user = [{"role": "user", "content": "x"}]
            bare, prompted = self._render(where, user, None), self._render(where, user, None, prompt=True)
            shared = bare if prompted.startswith(bare) else _common(self.tokenizer, prompted, bare)
            self._opening = prompted[len(shared) :]
        return self._opening

    # ------------------------------------------------------------------------------------- where turns stand

    def _turns(self, where, text: str, messages: list[dict], tools, turns: list[int]) -> list[tuple[int, int, str]]:
        """Return (start, end, what closes it) of each of the assistant's turns."""
        found = self._aligned(where, text, messages, tools, turns)
        if found is None:
            found, end = [], 0
            for i in turns:
                found.append(self._span(where, text, messages, tools, i, end))
                end = found[-1][1]
        # Of a turn that says nothing, the header may end with a special token, which ends no turn.
        return [(start, self._ended(text, end - len(closing.rstrip()), end), closing) for start, end, closing in found]

    def _aligned(self, where, text: str, messages, tools, turns: list[int]) -> list[tuple[int, int, str]] | None:
        """The turns, from one rendering with a marker in each; None where that is ambiguous."""
        numbers, in_calls = [str(n) for n in range(len(turns))], True
        pieces = self._pieces(where, messages, tools, turns, in_calls)
        if any(messages[i].get("tool_calls") and n not in pieces[1::2] for n, i in zip(numbers, turns)):
            in_calls = False  # the template does not write them
            pieces = self._pieces(where, messages, tools, turns, in_calls)
        if pieces[1::2] != numbers:
            return None
        gaps = pieces[::2]  # before the first marker, between two, behind the last
        starts = [self._before_start(where, gap, _before(messages, i)) for gap, i in zip(gaps, turns)]
        places = _only_places(text, [gap[:keep] for gap, (keep, _) in zip(gaps, starts)] + gaps[-1:])
        if places is None:
            return None
        found = []
        for n, i in enumerate(turns):
            keep, fits = starts[n]
            start, stop, tail = places[n] + keep, places[n + 1], gaps[n + 1]
            opening = self._opening_text(where)
            if fits and text.startswith(opening, start - fits):  # the answer begins with the thoughts of the prompt
                start += len(opening) - fits
            closing = tail
            if i + 1 < len(messages):
                closing = self._closing(where, messages, tools, i, tail, _marked(messages[i], _MARKER, in_calls))
            found.append((start, stop + len(closing.rstrip()), closing))
        return found if all(start <= end for start, end, _ in found) else None

    def _pieces(self, where, messages, tools, turns: list[int], in_calls: bool) -> list[str]:
        """The text with a marker in each turn, cut there, with the numbers of the markers; [] where it is refused."""
        marked = list(messages)
        for n, i in enumerate(turns):
            marked[i] = _marked(messages[i], f"jxMARKER{n}xj", in_calls)
        try:
            rendered = self._render(where, marked, tools)
        except UserError:
            return []
        for n, i in enumerate(turns):
            if in_calls:
                rendered = _once(rendered, f"jxMARKER{n}xj", messages[i])
        return _NUMBERED.split(rendered)

    def _before_start(self, where, before: str, asked: str) -> tuple[int, int]:
        """How much of the text before a marker is prompt, and how many characters of the opening stand at its end.

        The second is 0 unless the opening stands there in part only: a template may open with thoughts when it prompts,
        and write others or none. `asked` is the message before, behind which the turn begins, also where a turn has
        several parts that each begin like one (gpt-oss).
        """
        opening = self._opening_text(where)
        if not opening.strip():
            return len(before.rstrip()), 0
        behind = before.rfind(asked.strip()) + len(asked.strip()) if asked.strip() else -1
        if (at := before.find(opening, max(behind, 0)) if behind else -1) < 0:
            at = before.rfind(opening)
        if at >= 0:
            return at + len(opening), 0
        header = len(_THINK.split(opening)[0].rstrip())
        for k in range(len(opening) - 1, max(header, 1) - 1, -1):
            if (at := before.rfind(opening[:k])) >= 0:
                return at + k, k
        return len(before.rstrip()), 0

    def _closing(self, where, messages: list[dict], tools, i: int, tail: str, marked: dict) -> str:
        """The text that closes message i: the part after its marker that also follows when it is the last message."""
        names = [call["function"]["name"] for call in messages[i].get("tool_calls") or ()]
        key = json.dumps([{k: v for k, v in marked.items() if k != "reasoning_content"}, names], default=str)
        if key not in self._closings:
            try:
                alone = self._render(where, [{"role": "user", "content": "x"}, marked], tools)
            except UserError:  # a template that requires more messages
                alone = self._render(where, [*messages[:i], marked], tools)
            if len(self._closings) > 1000:
                self._closings.clear()
            self._closings[key] = _once(alone, _MARKER, messages[i]).rpartition(_MARKER)[2]
        alone = self._closings[key]
        if tail.startswith(alone.rstrip()):
            return alone
        same = next((i for i, (a, b) in enumerate(zip(alone, tail)) if a != b), min(len(alone), len(tail)))
        near = tail[: same + 24]  # where they part, with the token that begins there
        if (alone, near) not in self._commons:
            if len(self._commons) > 1000:
                self._commons.clear()
            self._commons[alone, near] = _common(self.tokenizer, alone, near)
        return self._commons[alone, near]

    def _span(self, where, text: str, messages: list[dict], tools, i: int, after: int) -> tuple[int, int, str]:
        """Return where the trained characters of message i start and end, and what the template closes the turn with.

        The assistant's turn before ends at `after`.
        """
        before, tail, marked = self._around_marker(where, messages, tools, i)
        if not text.endswith(tail):
            raise self._lost(where, i, "what the template writes after it depends on it")
        closing = tail if i + 1 == len(messages) else self._closing(where, messages, tools, i, tail, marked)
        end = len(text) - len(tail) + len(closing.rstrip())
        keep, fits = self._before_start(where, before[after:], _before(messages, i))
        start, opening = after + keep, self._opening_text(where)
        if fits and text.startswith(opening, start - fits):
            start += len(opening) - fits
            given = start - len(opening) + fits
        else:
            given = start
        if not text.startswith(before[:given]) or not after <= start <= end:
            raise self._lost(where, i, "what the template writes before it depends on it")
        return start, end, closing

    def _around_marker(self, where, messages: list[dict], tools, i: int) -> tuple[str, str, dict]:
        """Render with a marker in message i and cut there: (before, behind, the message with its marker)."""
        message = messages[i]
        tries = [_marked(message, _MARKER)]
        if message.get("tool_calls"):  # where the template does not write calls, `_hold` says so
            tries.append(_marked(message, _MARKER, in_calls=False))
        found = []
        for marked in tries:
            text = self._render(where, [*messages[:i], marked, *messages[i + 1 :]], tools)
            before, *tails = _once(text, _MARKER, message).split(_MARKER)
            if len(tails) == 1:
                return before, tails[0], marked
            found.append(len(tails))
        if message.get("tool_calls") and not any(found):
            self._vanished(where, i, "calls", _parts(message)["calls"])
        raise self._lost(where, i, f"the template writes its content {max(found)} times")

    def _is_ended(self, turn: str) -> bool:
        return turn.rstrip().endswith(self._ends)

    def _ended(self, text: str, start: int, end: int) -> int:
        """The end of a turn, with the special token that ends it, or the next role's where the turn has none."""
        if self._is_ended(text[start:end]):
            return end
        follows = re.compile(r"\s*").match(text, end).end()
        token = self._special.match(text, follows)
        return token.end() if token else end

    def _tagged_spans(self, where, text: str, messages: list[dict], tools) -> list[Span]:
        """The spans that the template marks itself, each extended over the special token that ends the turn, if any."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with time_limit(TEMPLATE_SECONDS, "it"):
                rendered, marks = render_jinja_template(
                    conversations=[messages],
                    tools=tools,
                    chat_template=self.template(tools),
                    return_assistant_tokens_mask=True,
                    **self.tokenizer.special_tokens_map,
                )
        except Exception as error:  # the template's own, as in `_render`; it may tell how often it is rendered
            raise UserError(f"{where}: the chat template fails with its generation marks: {error}.") from None
        if rendered[0] != text:
            raise UserError(f"{where}: the chat template renders differently with its generation marks.")
        starts = [start for start, _ in marks[0][1:]] + [len(text)]
        ends = [
            min(self._ended(text, *mark), to) if text[slice(*mark)].strip() else mark[1]
            for mark, to in zip(marks[0], starts)
        ]
        return [(start, end) for (start, _), end in zip(marks[0], ends)]

    def _lost(self, where: str, i: int, reason: str) -> UserError:
        return UserError(
            f"{where}, message {i + 1}: cannot tell which tokens of the chat template's output are the assistant's: "
            f"{reason}. Give a template with {{% generation %}} marks as model.chat_template."
        )

    # ------------------------------------------------------------------------------------- what was left out

    def _hold(self, where, text: str, conversation: Conversation, spans: list[Span], notes: Notes) -> None:
        """Compare the text with the messages: count what is missing, and refuse it where it was to be trained."""
        messages, at, turn = conversation.messages, 0, 0
        last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        for i, message in enumerate(messages):
            self._unread(where, message, conversation.tools, notes)
            if message["role"] == "assistant":
                region = text
                if spans:
                    (start, at), turn = spans[turn], turn + 1
                    region = text[start:at]
                lost = _lost_parts(message, region)
                for part, value in lost.items():
                    left = set(lost) < {
                        name for name, v in _parts(message).items() if v
                    }  # part of the message is trained
                    earlier = part == "thoughts" and i < last_user and left
                    if i in conversation.untrained or earlier or part in self.allowed:
                        notes.add(_LEFT_OUT, f"{part} of earlier turns" if earlier else part, where)
                    else:
                        self._vanished(where, i, part, value)
            else:
                region = text[at : spans[turn][0] if turn < len(spans) else len(text)] if spans else text
                if message["content"].strip() and not stands(message["content"], region):
                    region = text
                    if not stands(message["content"], text):
                        notes.add(_LEFT_OUT, f"{message['role']} messages", where)
                        continue
            _trimmed(where, message, region, notes)
        for tool in conversation.tools or ():
            name = (tool.get("function") or tool).get("name")
            if isinstance(name, str) and name not in text:
                notes.add(_LEFT_OUT, "tools", where)

    def _unread(self, where: str, message: Mapping, tools, notes: Notes) -> None:
        """Count fields that the template does not look at."""
        for field in message:
            if field in _FIELDS:
                continue
            key = field, bool(tools)
            if key not in self._reads:
                self._reads[key] = bool(re.search(rf"\b{re.escape(field)}\b", self.template(tools)))
            if not self._reads[key]:
                notes.add("fields of messages that are not used", field, where)

    def _vanished(self, where: str, i: int, part: str, value: str) -> None:
        shown = " ".join(value.split())
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise UserError(
            f"{where}, message {i + 1} (assistant): the chat template leaves out its {part} ({shown}), which would not "
            "be trained. Give a template that keeps them as model.chat_template, or allow it with "
            f"data.allow_left_out={part}."
        )


_DATED = "{{ 'the date is fixed'[:0] }}"  # not a comment, which would remove a line break
# strftime's directives; for times of day they give midnight.
_DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZC"


def uses_date(template: object) -> bool:
    """Whether a chat template (or one of several named ones) writes the current date."""
    templates = template.values() if isinstance(template, Mapping) else [template]
    return any("strftime_now" in text for text in templates if isinstance(text, str))


def with_date(template: str, date: datetime.date) -> str:
    """A chat template that writes this date, whatever the day."""
    midnight = datetime.datetime.combine(date, datetime.time())
    dates = {f"%{flag}{d}": midnight.strftime(f"%{flag}{d}") for flag in ("", "-") for d in _DIRECTIVES}
    steps = "".join(f" | replace({key!r}, {value!r})" for key, value in dates.items() if value != key)
    macro = f"{{%- macro strftime_now(form) -%}}{{{{ form{steps} | replace('%%', '%') }}}}{{%- endmacro -%}}"
    return f"{macro}{_DATED}{template}"


def without_date(template: str) -> str:
    """The template that `with_date` was given."""
    return template.partition(_DATED)[2] if _DATED in template else template


def special_tokens(tokenizer) -> list[str]:
    """The special tokens of a tokenizer, as text: the named ones and those added as special."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({token for token in (*tokenizer.all_special_tokens, *added) if token.strip()})


def _marked(message: dict, marker: str, in_calls: bool = True) -> dict:
    """A message with a marker as its content, or with tool calls as the name of the last, if the template writes them.

    Its thoughts, which may repeat the question, are no place to look for it.
    """
    if message.get("reasoning_content"):
        message = {**message, "reasoning_content": _THOUGHT}
    if not (in_calls and message.get("tool_calls")):
        return {**message, "content": marker}
    *calls, last = message["tool_calls"]
    return {**message, "tool_calls": [*calls, {**last, "function": {**last["function"], "name": marker}}]}


def _once(text: str, marker: str, message: Mapping) -> str:
    """A rendering with the marker where it stands first: a template may write a call's name again, behind the turn."""
    if not message.get("tool_calls"):
        return text
    before, found, behind = text.partition(marker)
    return before + found + behind.replace(marker, message["tool_calls"][-1]["function"]["name"])


def _before(messages: list[dict], i: int) -> str:
    """The content of the message before message i."""
    return messages[i - 1]["content"] if i and messages[i - 1]["role"] != "assistant" else ""


def _only_places(text: str, parts: list[str]) -> list[int] | None:
    """Where the parts stand in `text`: the first at its start, the last at its end, the others in order between.

    None unless there is one way only.
    """
    first, *between, last = parts
    stop = len(text) - len(last)
    if not (text.startswith(first) and text.endswith(last)) or len(first) > stop:
        return None
    left, at = [], len(first)
    for part in between:
        if (at := text.find(part, at, stop)) < 0:
            return None
        left.append(at)
        at += len(part)
    right, at = [], stop
    for part in reversed(between):
        if (at := text.rfind(part, len(first), at)) < 0:
            return None
        right.append(at)
    return [0, *left, stop] if left == right[::-1] else None


def _without(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """The spans that touch none of the others."""
    others = list(others)
    return [(a, b) for a, b in spans if not any(a < end and start < b for start, end in others)]


def _parts(message: Mapping) -> dict[str, str]:
    """The parts of an assistant's message, stripped: thoughts, answers, and the names and values of calls."""
    content, thoughts = message["content"], [message.get("reasoning_content") or ""]
    if "</think>" in content:
        thought, _, content = content.rpartition("</think>")
        thoughts.append(thought.replace("<think>", "").replace("</think>", ""))
    calls = [text for call in message.get("tool_calls") or () for text in _leaves(call["function"])]
    return {"thoughts": "\n".join(thoughts).strip(), "answers": content.strip(), "calls": "\n".join(calls)}


def _leaves(value: object) -> Iterable[str]:
    """The keys and single values of a call, as text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in ("name", "arguments"):
                yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    elif value not in ("", None):
        yield value if isinstance(value, str) else json.dumps(value, default=str)


def _lost_parts(message: Mapping, region: str) -> dict[str, str]:
    """The parts of a message (`_parts`) that are missing in the text of its turn."""
    parts, lost = _parts(message), {}
    if parts["answers"] and not stands(parts["answers"], region):
        lost["answers"] = parts["answers"]
    rest = region.replace(parts["answers"], "", 1) if parts["thoughts"] and parts["answers"] else region
    if parts["thoughts"] and not stands(parts["thoughts"], rest):
        lost["thoughts"] = parts["thoughts"]
    for text in parts["calls"].split("\n"):
        if text and not stands(text, region):
            lost.setdefault("calls", text)
    return lost


def stands(part: str, text: str) -> bool:
    """Whether a text contains a part of a message, verbatim or as a template may write it: trimmed, or as JSON."""
    part = part.strip()
    if part in text or any(json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True)):
        return True
    return _squeezed(part) in _squeezed(text)


def _squeezed(text: str) -> str:
    """The text without white space, quotes and escapes, which vary between ways to write JSON."""
    return re.sub(r"[\s\"'\\]+", "", text).casefold()


def _trimmed(where: str, message: Mapping, region: str, notes: Notes) -> None:
    """Count white space at the ends of a message that the template cut off."""
    content = message["content"]
    stripped = content.strip()
    if content == stripped or not stripped or "</think>" in content or content in region or stripped not in region:
        return
    indent = content[: len(content) - len(content.lstrip())].rpartition("\n")[2]
    if (len(indent) > 1 or "\t" in indent) and indent + stripped not in region:
        notes.add(_LEFT_OUT, "indentation of the first line", where)
    elif content.strip("\n") not in region:
        notes.add(_LEFT_OUT, "white space at the ends of messages", where)


def _common(tokenizer, a: str, b: str) -> str:
    """Return the text of the tokens with which both `a` and `b` begin."""
    ids_a, ids_b = (tokenizer(t, add_special_tokens=False, return_offsets_mapping=True) for t in (a, b))
    end = 0
    for x, y, (_, stop) in zip(ids_a["input_ids"], ids_b["input_ids"], ids_a["offset_mapping"]):
        if x != y:
            break
        end = stop
    return a[:end]
