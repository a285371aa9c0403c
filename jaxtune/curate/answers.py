"""Checks of pairs of answers, and of judged ones: equal and swapped pairs, length bias, and good against bad."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxtune.curate.finding import ERROR, NOTE, SHOWN, WARNING, Finding, share
from jaxtune.curate.stream import TRAIN, Chunk, Ledger
from jaxtune.data import RowForm, Rows

BIAS = 0.65  # share of pairs from which it is said that the longer answer wins
FEW = 20  # pairs, under which no bias is told
MOST = 4 / 3  # good over bad answers, weighted, and at least 1: what KTO's authors advise (section 4.2)
EVEN = (0.75, 2.0)  # within this there is nothing to do


def answer_checks(form: RowForm | None) -> list[Any]:
    """Return the checks for rows of this form, fresh."""
    if form is None or not form.judged:
        return []
    return [PairChecks(form)] if form.pairs else [Verdicts()]


class PairChecks:
    """Equal pairs, pairs that stand elsewhere the other way round, and how often the chosen answer is longer."""

    def __init__(self, form: Any):
        self.form = form
        self._parts: list[tuple[np.ndarray, ...]] = []

    def see(self, chunk: Chunk) -> None:
        if not len(chunk) or chunk.opened.split != TRAIN:
            return
        rejected = [self.form.rejected(example) for example in chunk.examples]
        sides = chunk.answers, rejected
        hashes = [np.array([hash(" ".join(text.casefold().split())) for text in texts]) for texts in sides]
        prompts = np.array([hash(" ".join(text.casefold().split())) for text in chunk.prompts])
        words = [np.array([len(text.split()) for text in texts]) for texts in sides]
        self._parts.append((chunk.first + np.arange(len(chunk)), prompts, *hashes, *words))

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        if not self._parts:
            return
        index, prompts, chosen, rejected, *words = (np.concatenate(column) for column in zip(*self._parts))
        kept = ledger.split[index] == TRAIN
        index, prompts, chosen, rejected = index[kept], prompts[kept], chosen[kept], rejected[kept]
        if len(index):
            yield from equal_pairs(index, chosen == rejected, ledger)
            yield from swapped(index, prompts, chosen, rejected, ledger)
            yield from length_bias(words[0][kept], words[1][kept], "words")


def equal_pairs(index: np.ndarray, same: np.ndarray, ledger: Ledger) -> Iterator[Finding]:
    """Say which pairs have one answer twice."""
    if same.any():
        yield Finding(
            "equal_pairs",
            ERROR if same.all() else WARNING,
            f"{share(int(same.sum()), len(index))} of the pairs have two equal answers, which teach nothing (case and "
            "white space apart)",
            "leave them out with jaxtune data --write-clean; if all are equal, see data.columns",
            ledger.places(index[same], SHOWN),
            int(same.sum()),
            index[same],
        )


def swapped(
    index: np.ndarray, prompts: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, ledger: Ledger
) -> Iterator[Finding]:
    """Say which pairs stand elsewhere the other way round, under the same prompt."""
    first: dict[tuple[int, int, int], int] = {}
    found: list[tuple[int, int]] = []
    for i, prompt, better, worse in zip(index.tolist(), prompts.tolist(), chosen.tolist(), rejected.tolist()):
        if better == worse:
            continue
        if (other := first.get((prompt, worse, better))) is not None:
            found.append((i, other))
        first.setdefault((prompt, better, worse), i)
    if found:
        yield Finding(
            "swapped_pairs",
            WARNING,
            f"{share(len(found), len(index))} of the pairs stand elsewhere with chosen and rejected swapped: together "
            "they teach nothing",
            "decide which answer is better; objective.label_smoothing tells the loss how often pairs are wrong",
            tuple(f"{ledger.where(i)} against {ledger.where(j)}" for i, j in found[:SHOWN]),
            len(found),
        )


def length_bias(chosen: np.ndarray, rejected: np.ndarray, unit: str) -> Iterator[Finding]:
    """Say how often and by how much the chosen answer is the longer one."""
    more = chosen - rejected
    longer, shorter = int((more > 0).sum()), int((more < 0).sum())
    part = longer / len(more)
    biased = len(more) >= FEW and max(part, shorter / len(more)) >= BIAS
    which = "longer" if longer >= shorter else "shorter"
    yield Finding(
        "length_bias",
        WARNING if biased else NOTE,
        f"the chosen answer is the longer one in {part:.0%} of {len(more):,} pairs and the shorter in "
        f"{shorter / len(more):.0%}; on average it has {chosen.mean():.1f} {unit}, the rejected one "
        f"{rejected.mean():.1f} ({more.mean():+.1f})",
        f"the model may learn to answer {which}: losses of means a token (simpo, sigmoid_norm, ipo) care less, or "
        "balance the lengths"
        if biased
        else "nothing to do: neither length decides",
    )


class Verdicts:
    """How many answers are good and how many bad."""

    def __init__(self):
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def see(self, chunk: Chunk) -> None:
        good = np.array([example.good for example in chunk.examples], bool)
        self._parts.append((chunk.first + np.arange(len(chunk)), good))

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        if self._parts:
            index, good = (np.concatenate(column) for column in zip(*self._parts))
            good = good[ledger.split[index] == TRAIN]
            yield from imbalance(int(good.sum()), int((~good).sum()))


def imbalance(good: int, bad: int) -> Iterator[Finding]:
    """Say what the good answers are to the bad ones, and which weights even them."""
    if not good or not bad:
        yield Finding(
            "one_verdict",
            ERROR,
            f"all {good + bad:,} answers are {'good' if good else 'bad'}: there is nothing to set them against",
            "add the others, or tune on good answers alone with objective.name=causal_lm",
        )
        return
    balanced = EVEN[0] <= good / bad <= EVEN[1]
    if good < bad:
        advice = f"objective.desirable_weight={bad / good:.3g} evens them"
    else:
        advice = f"objective.undesirable_weight={good / bad / MOST:.3g} brings them to 4 : 3"
    yield Finding(
        "imbalance",
        NOTE if balanced else WARNING,
        f"{good:,} good answers and {bad:,} bad ones ({good / (good + bad):.0%} good)",
        "nothing to do" if balanced else f"{advice}: weighted, good to bad should be from 1 to 4/3",
    )


def of_rows(form: RowForm, train: Sequence[Rows], hashed: Callable[[Rows, int], np.ndarray]) -> Iterator[Finding]:
    """The same of tokenised rows, from which equal pairs have been left out.

    Args:
        form: of the rows.
        train: the rows of each source.
        hashed: (rows, 0 for what is given, 1 for what is trained) -> a hash of each.
    """
    if not form.pairs:
        counts = form.classes(train)
        yield from imbalance(counts["good"], counts["bad"])
        return
    places = [rows.where(i) for rows in train for i in range(len(rows))]
    columns = [
        (hashed(rows, 0), hashed(rows, 1), hashed(rows.other, 1), *(_trained(side) for side in rows.sides))
        for rows in train
    ]
    prompts, chosen, rejected, *tokens = (np.concatenate(column) for column in zip(*columns))
    yield from swapped(np.arange(len(places)), prompts, chosen, rejected, _Places(places))
    yield from length_bias(*tokens, "tokens")


class _Places:
    """As much of a ledger as says where rows stand."""

    def __init__(self, places: Sequence[str]):
        self.places = places

    def where(self, i: int) -> str:
        return self.places[i]


def _trained(rows: Rows) -> np.ndarray:
    return np.array([np.count_nonzero(rows[i][1][1:]) for i in range(len(rows))], np.int64)
