"""How the rows of a data file are read: the format and the columns, recognised from common names.

Nothing here imports jax.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from jaxtune.data.files import header_hint, looks_tagged
from jaxtune.data.formats import ANSWERED, ASKED, FORMATS, MESSAGES, Reader, make_reader
from jaxtune.data.label_counts import count_ids, count_labels
from jaxtune.data.labels import LABELS, PAIR_COLUMNS, PAIRS, TAGS, WORDS, LabelForm
from jaxtune.data.preferences import LABELS as JUDGED
from jaxtune.data.preferences import PROMPTS as PREFERENCE_PROMPTS
from jaxtune.data.preferences import SIDES, JudgedForm, PairForm
from jaxtune.data.row_form import RowForm
from jaxtune.data.seq2seq import FORMATS as OF_TARGETS
from jaxtune.data.seq2seq import OURS, TRANSLATION, Seq2SeqForm
from jaxtune.data.sources import Source, kind, read
from jaxtune.errors import UserError
from jaxtune.objectives.task import TASKS, located

# Common names of prompts and completions, the surest first.
TEXTS = ("text", "sentence", "review", "content", "message", "utterance")
PROMPTS = (*(name for name in ASKED if name != "source"), *TEXTS, "source")  # which often says where a text is from
# Names of contexts of a question, and of system prompts.
CONTEXTS = ("input", "context", "passage", "background", "paragraph", "story", "document", "article", "evidence")
SYSTEMS = ("system", "system_prompt", "system_message")
# What the better and the worse of two answers are called, the surest names first.
BETTER_WORSE = (("chosen", "chosen_response", "preferred"), ("rejected", "rejected_response", "dispreferred"))
MOST_LABELS = 1000  # more, or more than half as many as rows, and a column is an answer rather than a label
COMPLETIONS = (*ANSWERED, "sql", *LABELS)
# Text before the answer, where prompt and answer are one text. A space after it belongs to the answer.
MARKERS = ("\n### Response:", "\n### Assistant:", "\nAssistant:", "\nResponse:", "\nAnswer:", "\nSQL:", "\nA:")
# What the two sides of a conversation begin with where it is one text.
DIALOGUES = (
    *(("### Human:", "### Assistant:"), ("### User:", "### Assistant:"), ("### Instruction:", "### Response:")),
    *(("<|im_start|>user", "<|im_start|>assistant\n"), ("<|user|>", "<|assistant|>"), ("<human>:", "<bot>:")),
    *(("[INST]", "[/INST]"), ("Human:", "Assistant:"), ("User:", "Assistant:")),
)

KINDS = {"sequence_classification": "SequenceClassification", "token_classification": "TokenClassification"}
SINGLE = "single_label_classification"
WHOLE = 2**31 - 1  # a length that no row exceeds
TRAINING = "the training data"  # the origin of labels that were not given by name


@dataclass(frozen=True)
class Recognised:
    """How the rows of a file are read: the settings of section `data`, and what to tell the person.

    Attributes:
        format: one of FORMATS; of labelled rows, the name of the objective.
        labels: how labelled rows are read; None: text.
        form: how the rows of another task are read; None: they are text or labelled.
        problem: of `objective.problem_type`; None: it follows from the model.
        own: the labels are the data's and differ from the model's.
        given: the user's settings for reading text, as `data.prepare` takes them.
    """

    format: str
    columns: Mapping[str, str]
    completion_from: str | None = None
    prompt_from: str | None = None
    labels: LabelForm | None = None
    form: RowForm | None = None
    notes: tuple[str, ...] = ()
    problem: str | None = None
    own: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, as `data.prepare` takes them."""
        if (form := self.labels or self.form) is not None:
            return {"labels": form}
        marks = {"completion_from": self.completion_from, "prompt_from": self.prompt_from}
        if self.format == "template":
            return dict(self.given)
        return {"format": self.format, "columns": dict(self.columns), **marks} | dict(self.given)

    def reader(self, source: Source) -> Reader:
        """The reader of a source. Raises UserError if its rows cannot be read in this way."""
        if self.form is not None:
            return self.form.reader(source)
        if self.labels is None:
            reader = make_reader(source, **self.settings)
            if mark := self.completion_from:
                counts = (str(row.get(reader.columns[0])).count(mark) for _, row in source)
                if not all(n >= 1 if self.prompt_from else n == 1 for n in counts):
                    raise UserError(f"{source.name}: not every text has {mark!r}")
            return reader
        counted = set() if self.labels.value else set(count_labels([source], self.labels).labels)
        if self.labels.origin == TRAINING and (more := counted - set(self.labels.names)):
            raise UserError(f"{source.name}: the label {min(more)!r} is in no training row")
        return self.labels.reader(source)

    @property
    def is_text(self) -> bool:
        """Whether the rows are text to continue, pairs and judged answers included."""
        form = self.labels or self.form
        return form is None or form.text

    @property
    def is_corpus(self) -> bool:
        """Whether all of each text is trained."""
        return self.format == "text" and not (self.completion_from or self.given.get("completion_from"))

    def __str__(self) -> str:
        pairs = [f"{ours}={theirs}" for ours, theirs in self.columns.items()]
        return ", ".join([self.format, *pairs])


# ------------------------------------------------------------------------------------------ what the rows are


def open_source(name: str) -> Source:
    """Open `name` as `data.read` does, with a hint for formats that are recognised but cannot be read."""
    path = Path(name).expanduser()
    if path.is_file() and path.stat().st_size:
        try:
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"{name}: cannot be read: {error.strerror}.") from None
        if not path.suffix:
            _refuse_bare_table(name, path)
        if path.suffix.lower() in (".txt", ".iob", ".bio", ".tsv") and looks_tagged(path):
            file, out = shlex.quote(str(path)), shlex.quote(str(path.with_suffix(".conll")))
            raise UserError(
                f"{name}: a word and its tag a line: such a file is called .conll. Copy it: cp {file} {out}"
            )
    return read(name)


def _refuse_bare_table(name: str, path: Path) -> None:
    """Raise UserError, with a command that converts the file, for lines of tab-separated cells."""
    try:
        with path.open(encoding="utf-8") as file:
            rows = [line.rstrip("\n").split("\t") for line in islice(file, 200)]
    except UnicodeDecodeError:
        return  # `read` reports the error
    if not all(len(row) >= 2 for row in rows):
        return
    distinct = [len({row[i] for row in rows}) for i in (0, 1)]
    header = "label\\ttext" if distinct[0] < distinct[1] else "text\\tlabel"
    file, table = shlex.quote(str(path)), shlex.quote(f"{path}.tsv")
    raise UserError(
        f"{name}: tab-separated lines without a header, such as {rows[0][:2]}. Give them a header and a suffix, for "
        f"example: (printf '{header}\\n'; cut -f1,2 {file}) > {table}"
    )


def reading(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of settings (path -> value) that say how text is read, as `data.prepare` takes them."""
    names = ("format", "template", "completion_from", "prompt_from", "system", "system_as_user", "roles", "ignore")
    return {name: settings[f"data.{name}"] for name in names if f"data.{name}" in settings}


def recognise(
    source: Source, columns: Mapping[str, str] | None = None, given: Mapping[str, Any] | None = None
) -> Recognised:
    """Find how the rows of `source` are read, from the names and types of the columns of its first row.

    Args:
        source: the rows.
        columns: jaxtune's name -> the file's, as far as the user has given them.
        given: other settings that the user has given, as `reading` returns them.

    Raises:
        UserError: prompts without answers, or columns of unknown names.
    """
    given = dict(given or {})
    number, row = next(iter(source))
    where, row = source.where(number), {name: v for name, v in row.items() if name not in (given.get("ignore") or ())}
    chosen = given.get("template") or given.get("format")
    if not chosen and (judged := _judged(source, row, columns or {}, given)) is not None:
        return judged
    if not chosen and not columns and (known := _by_tasks(source, row, given)) is not None:
        return known
    if not chosen and (labelled := _labelled(source, row, columns or {})) is not None:
        return labelled
    if chosen or columns:
        format, columns = make_reader(source, columns=columns, **given).format, dict(columns or {})
    else:
        format, columns = _match(where, row)
    if format == "text" and not chosen and (label := next((n for n in row if n.lower() in LABELS), None)):
        only = shlex.quote(f"text={columns.get('text', 'text')}")
        raise UserError(
            f"{where}: a text with a column {label!r}, which is {kind(row[label])} here and cannot be read as labels "
            f"throughout. Correct it, or to train on the text alone: --columns={only}."
        )
    reader = Recognised(format, columns, given=given).reader(source)
    looks = format == "text" and not given.get("completion_from")
    marker, until = _marks(source, reader.columns[0]) if looks else (None, None)
    notes = _label_notes(source, columns)
    if until:
        notes.append(
            f"every text is a conversation: what follows {marker.strip()!r} is trained, up to the next "
            f"{until.strip()!r}; rows with messages would be given the model's own marks"
        )
    elif marker:
        notes.append(f"{marker.strip()!r} occurs once in every text: the text after it is trained")
    return Recognised(format, columns, marker, until, notes=tuple(notes), given=given)


def recognise_targets(
    source: Source, columns: Mapping[str, str] | None = None, given: Mapping[str, Any] | None = None
) -> Recognised:
    """As `recognise`, for an encoder-decoder: which columns are the source and the target.

    Raises:
        UserError: none of them, by their names.
    """
    given = {name: (given or {})[name] for name in ("format", "template", "ignore") if name in (given or {})}
    whole = {"longest": WHOLE, "target": WHOLE, **given}
    form = Seq2SeqForm(columns=dict(columns or {}), **whole)
    try:
        reader = form.reader(source)
    except UserError:
        number, row = next(iter(source))
        if columns or given or TRANSLATION in row:
            raise
        try:
            format, found = _match(source.where(number), row)
        except UserError:
            format, found = None, {}
        if format not in OF_TARGETS:
            raise UserError(
                f"{source.where(number)}: an encoder-decoder needs a source and a target, and no columns have names "
                f"that say so. Columns found: {', '.join(row)}. Name both: --columns=source=THEIRS,target=THEIRS."
            ) from None
        if format == "prompt_completion":
            found = {name: found.get(name, name) for name in OURS.values()}
        form = Seq2SeqForm(columns=found, **whole)
        reader = form.reader(source)
    return Recognised("seq2seq", form.columns, form=form, notes=tuple(reader.notes.lines()))


def _judged(source: Source, row: dict, columns: Mapping[str, str], given: Mapping[str, Any]) -> Recognised | None:
    """How rows that judge answers are read: pairs, or good and bad ones; None for others."""
    theirs, ours = {name.lower(): name for name in row}, dict(columns)
    if "completion" in columns or "text" in columns:  # one side of a pair may be tuned on alone
        return None
    read_as = {name: given[name] for name in ("system", "system_as_user", "roles", "ignore") if given.get(name)}
    for side, names in zip(SIDES, BETTER_WORSE):
        if side not in ours and (found := next((theirs[n] for n in names if n in theirs), None)):
            ours[side] = found
    if set(SIDES) <= set(ours):
        if not {"prompt", *PREFERENCE_PROMPTS} & {*columns, *theirs} and (asked := _first_text(row, theirs, PROMPTS)):
            ours["prompt"] = asked
        ours = {name: column for name, column in ours.items() if name != column}
        form = PairForm(columns=ours, **read_as)
        form.reader(source)
        note = "pairs of answers, the better one first: tuned with DPO; objective.loss names other losses"
        return Recognised("preference", ours, form=form, notes=(note,))
    label = next((theirs[name] for name in JUDGED if name in theirs), None)
    values = {json.dumps(r.get(label)) for _, r in islice(source, MOST_LABELS)} if label else set()
    answered = {"messages", "conversations", "completion", "completions"} & set(theirs)
    if not label or columns or not answered or not values <= {"true", "false"}:
        return None
    form = JudgedForm(**read_as)
    form.reader(source)
    return Recognised("kto", {}, form=form, notes=("answers judged good or bad: tuned with KTO",))


def _by_tasks(source: Source, row: dict, given: Mapping[str, Any]) -> Recognised | None:
    """How rows are read that a task knows by their columns (`objectives.task.Entry`); else None."""
    for name, entry in TASKS.items():
        if entry.recognises and (found := located(entry.recognises)(source, row, given)) is not None:
            form, note = found
            return Recognised(name, {}, form=form, notes=(note,))
    return None


def _labelled(source: Source, row: dict, columns: Mapping[str, str]) -> Recognised | None:
    """How rows of one or two texts and a label, or of words and tags, are read; None for others."""
    theirs = {name.lower(): name for name in row}
    if columns:
        per_token, ours = bool({"tokens", "labels"} & set(columns)), dict(columns)
        if not per_token and "label" not in columns:
            return None
    else:
        words, tags = (next((theirs[n] for n in names if _is_list(row, theirs, n)), None) for names in (WORDS, TAGS))
        per_token = bool(words and tags)
        ours = {"tokens": words, "labels": tags} if per_token else _text_and_label(row, theirs)
        if ours is None:
            return None
    form = LabelForm(per_token, columns=ours, origin=TRAINING)
    ours = form.columns = form.theirs(source)
    label = list(ours.values())[-1]
    if not per_token:
        form.several = isinstance(row[label], list)
        form.value = not form.several and _is_value(source, label)
    if form.value:
        form.names, notes = (
            ("LABEL_0",),
            [f"{label!r} is a number and not a class: it is predicted as a value (regression)"],
        )
    else:
        try:
            counted = count_labels([source], form)
        except UserError:
            if columns or form.several or per_token:
                raise
            return None
        counts = counted.labels
        plain = not (columns or per_token or form.several or "text_pair" in ours)
        if plain and not 2 <= len(counts) <= min(MOST_LABELS, max(2, counted.rows / 2)):
            return None
        if len(counts) < 2:
            raise UserError(
                f"{source.name}: every row has the same label, {min(counts)!r}; two are needed to learn from."
            )
        form.names = counted.names
        shown = ", ".join(name for name, _ in counts.most_common(3)) + (", ..." if len(counts) > 3 else "")
        notes = [f"{label!r} has {len(counts)} labels ({shown})", *counted.notes]
    if not per_token and "text_pair" not in ours and not form.several and not form.value:
        pair = shlex.quote(f"prompt={ours['text']},completion={label}")
        notes.insert(1, f"to have a model write the label after the text instead: --columns={pair}")
    columns = {name: column for name, column in ours.items() if name != column}
    kind = "token_classification" if per_token else "sequence_classification"
    problem = "multi_label_classification" if form.several else "regression" if form.value else None
    return Recognised(kind, columns, labels=form, notes=tuple(notes), problem=problem)


def _text_and_label(row: dict, theirs: Mapping[str, str]) -> dict[str, str] | None:
    """jaxtune's names of the columns of one or two texts and their label, or None."""
    found = next((theirs[n] for n in LABELS if n in theirs and not isinstance(row[theirs[n]], dict)), None)
    pair = next(([theirs[n.lower()] for n in pair] for pair in PAIRS if all(n.lower() in theirs for n in pair)), None)
    if pair and found and all(isinstance(row[name], str) for name in pair):
        return dict(zip(PAIR_COLUMNS, (*pair, found)))
    text, answer = _first_text(row, theirs, TEXTS + PROMPTS), _first_text(row, theirs, COMPLETIONS)
    if not text or not found or (answer and answer.lower() not in LABELS):
        return None
    return {"text": text, "label": found}


def _is_value(source: Source, column: str) -> bool:
    """Whether all values are numbers, and some are not integers."""
    broken = False
    for _, row in source:
        value = row.get(column)
        number = value if isinstance(value, float) else None
        if isinstance(value, str) and re.fullmatch(r"\s*-?\d*\.\d+\s*", value):
            number = float(value)
        if number is None and not re.fullmatch(r"\s*-?\d+\s*", str(value)):
            return False
        broken |= number is not None and not number.is_integer()
    return broken


def fitted(layout: Recognised, source: Source, stored: Any) -> Recognised:
    """`layout` with the model's labels, if they include those of the data.

    Args:
        layout: as recognised from the data.
        source: its rows.
        stored: what `read_labels` found in the model's config; None: nothing.
    """
    form = layout.labels
    if form is None or form.value or stored is None or stored.kind != KINDS[layout.format]:
        return layout
    if not form.per_token and stored.problem != (layout.problem or SINGLE):
        return replace(layout, problem=layout.problem or SINGLE)
    trial = replace(form, names=stored.names, origin="the model's config.json", notes=[])
    try:
        count_ids([source], trial)
    except UserError as error:
        mine = ", ".join(stored.names[:5]) + (", ..." if len(stored.names) > 5 else "")
        first = "; if they are numbers of these, set objective.first_label" * ("first_label" in str(error))
        note = f"the model's own labels ({mine}) are different, so a new head is trained{first}"
        return replace(layout, notes=(*layout.notes, note), own=True)
    return replace(layout, labels=trial)


def _is_list(row: dict, theirs: Mapping[str, str], name: str) -> bool:
    return name in theirs and isinstance(row[theirs[name]], list)


def _match(where: str, row: dict) -> tuple[str, dict[str, str]]:
    """Return the format and the mapping of columns (our name -> the file's) where they differ."""
    theirs = {name.lower(): name for name in row}  # names are compared without regard to case

    def mapped(format: str, **columns: str) -> tuple[str, dict[str, str]]:
        return format, {ours: name for ours, name in columns.items() if ours != name}

    for format in ("chat", "sharegpt"):
        (column,) = FORMATS[format][0]
        if column in row:
            return format, {}
    for name in sorted(MESSAGES & set(theirs)):
        if _is_conversation(row[theirs[name]]):
            return mapped("chat", messages=theirs[name])
    if row.get("completion") and any(_is_conversation(row.get(side)) for side in FORMATS["prompt_completion"][0]):
        return "prompt_completion", {}  # as lists of messages
    prompt, completion = _first_text(row, theirs, PROMPTS), _first_text(row, theirs, COMPLETIONS)
    asks = prompt and prompt.lower() in ("question", "query")
    context, system = (
        next(
            (theirs[n] for n in names if n in theirs and isinstance(row[theirs[n]], str) and n != str(prompt).lower()),
            None,
        )
        for names in ((*CONTEXTS, "text") if asks else CONTEXTS, SYSTEMS)
    )
    if prompt and completion and (prompt.lower() == "instruction" or context or system):
        more = {"input": context} if context else {}
        return mapped(
            "instruction", instruction=prompt, **more, output=completion, **({"system": system} if system else {})
        )
    if prompt and completion:
        return mapped("prompt_completion", prompt=prompt, completion=completion)
    if text := _first_text(row, theirs, ("text",)):
        return mapped("text", text=text)
    raise _unknown(where, row, theirs)


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _first_text(row: dict, theirs: Mapping[str, str], names: Sequence[str]) -> str | None:
    """Return the file's name of the first of `names` that holds a text or number."""
    return next((theirs[n] for n in names if n in theirs and kind(row[theirs[n]]) in ("text", "a number")), None)


def _unknown(where: str, row: dict, theirs: Mapping[str, str]) -> UserError:
    found = f"Columns found: {', '.join(row)}."
    asked = next((theirs[n] for n in (*PROMPTS, *sorted(MESSAGES)) if n in theirs), None)
    answer = next((theirs[n] for n in (*COMPLETIONS, "answers") if n in theirs), None)
    if asked and not (answer and _first_text(row, theirs, (asked.lower(),))):
        return UserError(
            f"{where}: prompts ({asked!r}) without answers: there is nothing to train on. {found} Add a column with "
            "the answer, or if one of these is it: --columns=prompt=THEIRS,completion=THEIRS."
        )
    if asked:
        return UserError(f"{where}: column {answer!r} is {kind(row[answer])}, expected text as the answer. {found}")
    if len(row) == 1:
        (column,) = row
        say = f"If it is the text to train on: --columns={shlex.quote(f'text={column}')}."
    else:
        say = "Say what they are: --columns=prompt=THEIRS,completion=THEIRS, or --columns=text=THEIRS for plain text."
    hint = header_hint(where.rpartition(":")[0], list(row))
    return UserError(f"{where}: no column has a name that says what it is. {found} {say}{hint}")


def _marks(source: Source, column: str) -> tuple[str | None, str | None]:
    """The text before the answers and the text after them, in every text: the marker that occurs once, and None; or
    those of the two sides of a conversation. (None, None): neither."""
    markers, dialogues = MARKERS, DIALOGUES
    for _, row in source:
        text = row.get(column)
        text = text if isinstance(text, str) else ""
        markers = [mark for mark in markers if text.count(mark) == 1]
        dialogues = [(asks, answers) for asks, answers in dialogues if 0 <= text.find(asks) < text.find(answers)]
        if not markers and not dialogues:
            return None, None
    return (markers[0], None) if markers else dialogues[0][::-1]


def _label_notes(source: Source, columns: Mapping[str, str]) -> list[str]:
    label = columns.get("completion", "")
    if label.lower() not in LABELS:
        return []
    counts = Counter(str(row.get(label)) for _, row in source)
    shown = ", ".join(name for name, _ in counts.most_common(3)) + (", ..." if len(counts) > 3 else "")
    notes = [f"{label!r} has {len(counts)} labels ({shown}): the model learns to write the label after the text"]
    if all(name.lstrip("-").isdigit() for name in counts):
        notes.append("the labels are numbers: names mean more to a language model")
    return notes
