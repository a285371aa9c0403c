"""A scorer of one's own: is the tone that of a polite clerk?

    jaxtune eval runs/a --scorer=examples/tone.py:polite

A scorer gets the answer and the expected answer as texts and returns a number, more being better, or None where it has
nothing to say. Any Python that you trust may stand here: a word list as below, a classifier, a call to a judge.
"""

import re

POLITE = re.compile(r"\b(please|thank you|thanks|of course|happy to|sorry)\b", re.IGNORECASE)
CURT = re.compile(r"\b(whatever|obviously|calm down|not my problem)\b|!{2,}|\b[A-Z]{4,}\b")


def polite(prediction: str, reference: str) -> float | None:
    """1 for a polite answer, 0.5 for a plain one, 0 for a curt or shouted one; None where no answer was expected."""
    if not reference:
        return None
    if CURT.search(prediction):
        return 0.0
    return 1.0 if POLITE.search(prediction) else 0.5
