"""How a task whose rows are not text to continue reads, tokenises and shows them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxtune.data.formats import Reader
from jaxtune.data.rows import Rows
from jaxtune.data.sources import Source


class RowForm:
    """The form of a task's rows. A subclass gives `settings`, `reader`, `encoder`, `sides` and `answers`.

    Attributes:
        notes: sentences for the user on how the rows were read.
        per_token: marks name a label for each word.
        several: a row may have several classes, or none.
        text: the marks are those of text: 1 at a token that is trained (`jaxtune.data.tokenize.Encoder`).
        judged: answers are judged, as pairs or each as good or bad.
        pairs: a row is two texts, of which the first is better.
        cuts_itself: a text that is too long is cut where it is tokenised, if at all: what is left over is left out.
        belongs: a row is texts that belong together, without a label: a text may belong to several others.
    """

    notes: Sequence[str] = ()
    per_token: bool = False
    several: bool = False
    text: bool = False
    judged: bool = False
    pairs: bool = False
    cuts_itself: bool = False
    belongs: bool = False

    def on(self, tokenizer: Any) -> "RowForm":
        """Return the form for rows that this tokenizer will read."""
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the tokens, marks and targets of a row, as JSON; it is part of the cache's key."""
        raise NotImplementedError

    def reader(self, source: Source) -> Reader:
        """Return what reads an example from each row of a source.

        Raises:
            UserError: the columns do not fit.
        """
        raise NotImplementedError

    def opened(self, sources: Iterable[Source]) -> None:
        """See all sources, before a row of any is tokenised."""

    def encoder(self, tokenizer: Any) -> Any:
        """Return what makes (ids, marks, target) of an example, as `jaxtune.data.label_rows.LabelEncoder` does.

        It has `encode(places, examples)`, `closed(rows, max_length, whole)`, the dtypes `ROW` and `MARK`, and `FIRST`:
        the first token of a row that can be trained.
        """
        raise NotImplementedError

    def lengths(self, rows: Rows) -> np.ndarray:
        """Return how many tokens each row takes of data.max_length, i[R]."""
        return rows.longest

    def incomplete(self, rows: Rows) -> np.ndarray:
        """Return which rows may have an answer that was cut, bool[R], where the form cuts texts itself."""
        return np.zeros(len(rows), bool)

    def said(self, rows: Sequence[Rows]) -> list[str]:
        """Return what is to be said of the training rows of all sources, in sentences."""
        return []

    def sides(self, example: Any) -> tuple[str, str]:
        """Return (prompt, answer) of an example, as text."""
        raise NotImplementedError

    def answers(self, rows: Rows) -> np.ndarray:
        """Return a hash of each row's answer, i64[R], to find rows of the same text and different answers."""
        raise NotImplementedError

    def check(self, rows: Sequence[Rows]) -> None:
        """Raise UserError if nothing can be learnt from the training rows of all sources."""

    def seen(self, rows: Rows) -> None:
        """Take from all rows, whole, the lengths of its own that `jaxtune init` proposes."""

    def proposes(self) -> Sequence[tuple[str, Any, str]]:
        """Return what `jaxtune init` proposes for such rows: (setting, value, why), in the order of the schema."""
        return ()

    def rows_a_step(self, rows: int) -> int:
        """Return the batch size that it proposes for so many rows."""
        return 8 if rows < 1000 else 16

    def cut_to(self, length: int) -> None:
        """Take the length that it proposes, where the form cuts texts itself."""

    def classes(self, rows: Sequence[Rows]) -> Counter | None:
        """Return how often each class occurs in the training rows; None: there are no classes."""
        return None

    def classes_of(self, example: Any) -> list[str]:
        """Return the classes of a row that may have several."""
        return []

    def pieces(self, example: Any) -> list[tuple[str, bool]]:
        """Return a row as [(text, whether it is predicted), ...], to be shown."""
        given, answer = self.sides(example)
        return [(f"{given}\n", False), (answer, True)]

    def render(self, rows: Rows, tokenizer: Any, n: int = 2) -> str:
        """Return the first n rows as the model sees them."""
        return "\n".join(
            f"{rows.where(i)}: {len(rows[i][0])} tokens\n{tokenizer.decode(rows[i][0].tolist())}\n"
            for i in range(min(n, len(rows)))
        )
