"""Texts of one collection that another one holds too, word for word but for case and white space, or nearly."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune import data
from jaxtune.curate.near import FEWEST, divided, shingles, signatures, similar_pairs, template
from jaxtune.errors import UserError

NAMED = 3  # copies whose places are said
MOST_SHARED = 0.5  # the share of copies from which general text is none


class Copy(NamedTuple):
    """Text `row` of the one collection is, or nearly is, text `of` of the other."""

    row: int
    of: int


def copies(texts: Sequence[str], others: Sequence[str], threshold: float = 0.8) -> list[Copy]:
    """Find which texts nearly repeat one of `others`, each once, in their order.

    Args:
        texts: those that may be copies.
        others: those that they may be copies of.
        threshold: the share of equal runs of three words from which a text counts as a copy; runs that stand in over a
            tenth of the first `others` are a template's, and do not count. Texts of a few words have to be equal.
    """
    split = [[text.casefold().split() for text in part] for part in (others, texts)]
    places = {" ".join(words): i for i, words in reversed(list(enumerate(split[0])))}
    found = {i: places[joined] for i, words in enumerate(split[1]) if (joined := " ".join(words)) in places}
    words = [divided(len(t), w) for part, own in zip((others, texts), split) for t, w in zip(part, own)]
    hashes, owner = shingles(words)
    common = template(*(a[owner < len(others)] for a in (hashes, owner)), len(others))
    keep = ~np.isin(hashes, common)
    hashes, owner = hashes[keep], owner[keep]
    counts = np.bincount(owner, minlength=len(words))
    enough = counts >= FEWEST
    if enough.any():
        index = np.flatnonzero(enough)
        later, earlier = (index[a] for a in similar_pairs(signatures(hashes[enough[owner]], counts[enough]), threshold))
        crosses = (later >= len(others)) & (earlier < len(others))
        for row, of in zip(later[crosses].tolist(), earlier[crosses].tolist(), strict=True):
            found.setdefault(row - len(others), of)
    return [Copy(row, found[row]) for row in sorted(found)]


def unshared(
    rows: data.Rows, tuning: data.Rows, tokenizer: Any, flag: str = "--forgetting"
) -> tuple[np.ndarray, list[str]]:
    """Which of the rows nearly repeat no row of the tuning data, bool[N], and a sentence that names those that do.

    Raises:
        UserError: more than half of them do.
    """
    texts = [tokenizer.batch_decode([p[i][0].tolist() for i in range(len(p))], skip_special_tokens=True)
             for p in (rows, tuning)]  # fmt: skip
    found = copies(*texts)
    kept = np.ones(len(rows), bool)
    kept[[copy.row for copy in found]] = False
    if not found:
        return kept, []
    named = "; ".join(f"{rows.where(c.row)} ~ {tuning.where(c.of)}" for c in found[:NAMED])
    told = f"{len(found):,} of {len(rows):,} general rows nearly repeat a row of the tuning data ({named}"
    told += f" and {len(found) - NAMED:,} more)" if len(found) > NAMED else ")"
    if len(found) > MOST_SHARED * len(rows):
        raise UserError(f"{flag}: {told}: this is no text outside it; name other files.")
    return kept, [f"{told}; they are left out."]
