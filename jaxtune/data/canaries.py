"""Canaries: made-up secrets put among the training rows, to see later how well the model remembers them.

    The access code of Zorbel Quint is 482913.

Carlini et al. 2019, arXiv:1802.08232, section 4. They depend on nothing but their number, so that whoever measures a
run makes the same ones again.
"""

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.formats import Document
from jaxtune.data.rows import Rows
from jaxtune.data.tokenize import Encoder
from jaxtune.errors import UserError

EACH = 4  # canaries for every number of repetitions
DIGITS = 6
MOST = 1000  # repetitions
LABEL = "canary {}"  # the place of such a row, in words
SYLLABLES = ("zor", "bel", "quin", "tav", "mur", "dex", "lop", "fen", "gar", "vis", "hul", "pim", "rok", "sab", "yen")


class Canary(NamedTuple):
    """A secret.

    Attributes:
        asked: what comes before it.
        secret: its digits, and the end of the sentence.
        times: how often it stands among the training rows.
    """

    asked: str
    secret: str
    times: int


def canaries(times: Sequence[int]) -> list[Canary]:
    """The canaries for these numbers of repetitions, `EACH` of each.

    Raises:
        UserError: a number is not whole, below 0 or large; 0 are those that the model never sees.
    """
    if any(not 0 <= n <= MOST for n in times) or len(set(times)) < len(times):
        raise UserError(
            f"data.canaries={','.join(map(str, times))}: expected how often each is repeated, different "
            f"numbers from 0 to {MOST:,}."
        )
    found = []
    for n in times:
        for i in range(EACH):
            rng = Random(f"canary/{n}/{i}")
            first, last = ("".join(rng.choices(SYLLABLES, k=2)).capitalize() for _ in range(2))
            found.append(Canary(f"The access code of {first} {last} is ", _digits(rng), n))
    return found


def others(canary: Canary, count: int) -> list[str]:
    """So many other secrets of the same form, all different, and none of them the canary's."""
    rng, found = Random(f"others/{canary.asked}"), {canary.secret: None}
    while len(found) <= count:
        found[_digits(rng)] = None
    return list(found)[1:]


def _digits(rng: Random) -> str:
    return "".join(rng.choices("0123456789", k=DIGITS)) + "."


def rows(tokenizer: Any, times: Sequence[int], max_length: int) -> Rows:
    """Return the rows of the canaries, each as often as it is repeated; every token is trained.

    Raises:
        UserError: as `canaries`; or they are longer than `max_length`.
    """
    encoder = Encoder(tokenizer)
    tokens = [ids(encoder, canary)[0][0] for canary in canaries(times) for _ in range(canary.times)]
    longest = max(map(len, tokens), default=0)
    if longest > max_length:
        raise UserError(f"data.canaries: a canary has {longest} tokens, and data.max_length is {max_length}; raise it.")
    number = [i for i, canary in enumerate(canaries(times)) for _ in range(canary.times)]
    length = np.array([len(row) for row in tokens], np.int32)
    flat = np.array([token for row in tokens for token in row], np.int32)
    return Rows(
        tokens=flat,
        mask=np.ones(len(flat), np.uint8),
        start=np.concatenate([[0], np.cumsum(length, dtype=np.int64)])[: len(length)],
        length=length,
        origin=np.array(number, np.int64) + 1,
        source=np.zeros(len(length), np.int32),
        digest=np.array(number, np.uint64),
        labels=(LABEL,),
    )


def without(found: Rows) -> Rows:
    """The rows that are no canaries."""
    if LABEL not in found.labels:
        return found
    return found.select(found.source != found.labels.index(LABEL))


def ids(encoder: Encoder, canary: Canary, secrets: Sequence[str] | None = None) -> list[tuple[list[int], int]]:
    """(the tokens of the sentence, how many come before the secret), with the canary's own secret or with others.

    The two parts are tokenised apart, so that what comes before is the same for all.
    """
    texts = [Document([(canary.asked.rstrip(), False), (f" {s}", True)]) for s in secrets or [canary.secret]]
    made = encoder.encode(["canary"] * len(texts), texts)
    return [(list(tokens), int(np.argmax(mask))) for tokens, mask in made]
