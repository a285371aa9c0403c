"""Rows as text for the user, with the trained tokens marked."""

from itertools import groupby

from jaxtune.data.rows import Rows
from jaxtune.errors import printable


def runs(tokenizer, tokens, mask) -> list[tuple[str, bool]]:
    """Return the text of a row as (text, trained) in runs of equal mask. The first token is never trained."""
    trained = [False, *(bool(m) for m in mask[1:])]
    result, done, text = [], 0, ""
    for value, group in groupby(range(len(tokens)), key=lambda i: trained[i]):
        done += len(list(group))
        # Decoding from the start keeps the spaces that a decoder strips from the start of a text.
        whole = tokenizer.decode(
            [int(t) for t in tokens[:done]], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        result.append((whole[len(text) :], value))
        text = whole
    return result


def render_rows(rows: Rows, tokenizer, n: int = 2):
    """Return a rich Text of the first n rows: trained tokens green, the rest dim, one heading a row."""
    from rich.text import Text

    text = Text()
    for i in range(min(n, len(rows))):
        text.append(_heading(rows, i) + "\n", style="bold")
        for piece, trained in runs(tokenizer, *rows[i]):
            text.append(printable(piece), style="green" if trained else "dim")
        text.append("\n")
    return text


def render_plain(rows: Rows, tokenizer, n: int = 2) -> str:
    """Return the first n rows as plain text: trained tokens are between ⟦ and ⟧."""
    blocks = []
    for i in range(min(n, len(rows))):
        pieces = runs(tokenizer, *rows[i])
        blocks.append(
            _heading(rows, i) + "\n" + "".join(f"⟦{piece}⟧" if trained else piece for piece, trained in pieces) + "\n"
        )
    return printable("".join(blocks))


def _heading(rows: Rows, i: int) -> str:
    tokens, mask = rows[i]
    return f"{rows.where(i)}: {len(tokens)} tokens, {int(mask[1:].sum())} trained"
