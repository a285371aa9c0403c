"""The labels of a data set, counted and named before its rows are tokenised."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxtune.data.labels import (
    NUMBER,
    LabelForm,
    is_ignored,
    label_name,
    list_of,
    several_labels,
    shown,
    value_of,
    vector_width,
)
from jaxtune.data.sources import Source
from jaxtune.errors import UserError


@dataclass(frozen=True)
class Counted:
    """The labels of the data.

    Attributes:
        labels: how often each occurs, by name.
        rows: how many there are.
        names: in the order of their ids: that of the data set where it has one, else sorted.
        notes: sentences on names that are written in several ways.
    """

    labels: Counter
    rows: int
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def count_labels(sources: Iterable[Source], form: LabelForm) -> Counted:
    """Count the labels of the data; `form` says where they are."""
    found: Counter = Counter()
    spaced: Counter = Counter()
    rows, order, widths = 0, [], set()
    for source in sources:
        column = list(form.theirs(source).values())[-1]
        width = None
        if form.several:
            width = vector_width(several_labels(source.where(n), column, row.get(column)) for n, row in source)
            widths.add(width if width and width > 1 else None)
        order += [name for name in source.classes.get(column, ()) if name not in order]
        for number, row in source:
            rows += 1
            where = source.where(number)
            label = value_of(where, row, column)
            if form.per_token:
                labels = [one for one in list_of(where, row, column) if not is_ignored(one)]
            elif form.several:
                labels = several_labels(where, column, label)
                if width and width > 1:
                    labels = [f"LABEL_{i}" for i, yes in enumerate(labels) if yes]
            else:
                labels = [label]
            found.update(label_name(where, column, one) for one in labels)
            spaced.update(one.strip() for one in labels if isinstance(one, str) and one != one.strip())
    if widths - {None}:
        if len(widths) > 1:
            raise UserError(
                "data.train: one source gives a 0 or 1 for each label, and another gives labels in another way."
            )
        names = tuple(f"LABEL_{i}" for i in range(widths.pop()))
    else:
        names = tuple(order) if order and set(found) <= set(order) else in_order(found)
    notes = [f"labels with white space around them are read without it: {shown(list(spaced))}"] if spaced else []
    notes += [alike(group) for group in written_alike(names)]
    return Counted(found, rows, names, tuple(notes))


def count_ids(sources: Iterable[Source], form: LabelForm) -> Counted:
    """Count the labels of the data by the names in `form`, into which the data's are translated."""
    found: Counter = Counter()
    rows = 0
    for source in sources:
        convert = form.reader(source).convert
        for number, row in source:
            rows += 1
            labels = convert(source.where(number), row)[1]
            ids = np.flatnonzero(labels).tolist() if form.several else [int(i) for i in labels if i is not None]
            found.update(form.names[i] for i in ids)
    return Counted(found, rows, form.names)


def written_alike(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ in case or white space only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"[\s_-]+", "", name.casefold()), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def alike(group: Sequence[str]) -> str:
    """The note on labels that differ only in case or white space."""
    shown = " and ".join(map(repr, group))
    return (
        f"the labels {shown} differ in case or white space only and count as different classes; correct the rows if not"
    )


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Labels sorted: numbers by size, names alphabetically, O first among tags."""
    names = list(names)
    if all(map(NUMBER.fullmatch, names)):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names, key=lambda name: (name != "O", name)))
