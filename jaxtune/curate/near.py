"""Near duplicates by MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al., chapter 3).

A row is the set of its three-word shingles; the share of equal entries in two signatures estimates the Jaccard
similarity of two sets. Rows that agree in a whole band of the signature are compared. Of each entry the low 16 bits
are kept (b-bit minwise hashing, Li & König 2010, arXiv:0910.3349), so that a band of four is one uint64:
128 bytes a row.
"""

from collections.abc import Iterator
from itertools import chain
from zlib import crc32

import numpy as np

from jaxtune.curate.finding import SHOWN, Finding, graded, share
from jaxtune.curate.sets import first_of
from jaxtune.curate.stream import EVAL, TRAIN, Chunk, Ledger

PERMUTATIONS = 64  # the estimate of a similarity of 0.8 is off by 0.05
BAND = 4  # 16 bands: a pair at 0.8 is missed once in 4,000, one at 0.5 is compared in two of three cases
SHINGLE = 3  # words
FEWEST = 4  # shingles: shorter rows are near to one another without being copies
TEMPLATE = 0.1  # the share of rows from which a shingle belongs to their template
SAMPLE = 100  # rows needed to recognise a template
SEED = 1


class NearDuplicates:
    """Rows with nearly the same text, within training, and between training and evaluation.

    Shingles in over a tenth of the first rows belong to a template and are left out.

    Args:
        threshold: the similarity from 0 to 1 from which rows count as copies.
    """

    def __init__(self, threshold: float = 0.8):
        self.threshold = threshold
        self._signatures: list[np.ndarray] = []
        self._index: list[np.ndarray] = []
        self._common: np.ndarray | None = None

    def see(self, chunk: Chunk) -> None:
        texts = zip(chunk.prompts, chunk.answers, *chunk.words)
        hashes, owner = shingles([divided(len(p) + len(a), given + answered) for p, a, given, answered in texts])
        if self._common is None:
            self._common = template(hashes, owner, len(chunk))
        keep = ~np.isin(hashes, self._common)
        hashes, owner = hashes[keep], owner[keep]
        counts = np.bincount(owner, minlength=len(chunk))
        enough = counts >= FEWEST
        if enough.any():
            self._signatures.append(signatures(hashes[enough[owner]], counts[enough]))
            self._index.append(chunk.first + np.flatnonzero(enough))

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        if not self._index:
            return
        index = np.concatenate(self._index)
        # A row and its exact copies count once here; another check reports exact copies.
        once = first_of(ledger.digest[index]) == np.arange(len(index))
        held = ledger.split[index] == EVAL
        order = np.concatenate([np.flatnonzero(~held & once), np.flatnonzero(held)])  # evaluation rows come last
        kept = self._taken(order, len(index))
        index = index[order]
        later, earlier = similar_pairs(kept, self.threshold)
        in_train = ledger.split[index[later]] == TRAIN
        copies, originals = superfluous(later[in_train], earlier[in_train])
        if len(copies):
            yield Finding(
                "near_duplicates",
                graded(len(copies), len(ledger.rows(TRAIN))),
                f"{share(len(copies), len(ledger.rows(TRAIN)))} of the training data nearly repeat another "
                f"(similarity {self.threshold:g} or more of their runs of {SHINGLE} words)",
                "look at some; jaxtune data --write-clean --drop-near keeps the first of each",
                _pairs(ledger, index[copies], index[originals]),
                len(copies),
                index[copies],
                index[originals],
                asked=True,
            )
        leaked = ~in_train & (ledger.split[index[earlier]] == TRAIN)
        leaked &= ledger.digest[index[later]] != ledger.digest[index[earlier]]
        if leaked.any():
            ours, theirs = index[earlier[leaked]], index[later[leaked]]
            rows, first = np.unique(theirs, return_index=True)
            total = len(ledger.rows(EVAL))
            yield Finding(
                "near_overlap",
                graded(len(rows), total),
                f"{share(len(rows), total)} of the evaluation data nearly repeat a training row",
                "the score is partly memory: jaxtune data --write-clean --drop-near leaves these training rows out",
                _pairs(ledger, rows, ours[first]),
                len(rows),
                ours,
                theirs,
                asked=True,
            )

    def _taken(self, order: np.ndarray, n: int) -> np.ndarray:
        """Signatures in this order; each part is freed once it is copied, so that memory never holds them twice."""
        place = np.full(n, len(order))
        place[order] = np.arange(len(order))
        kept = np.empty((len(order) + 1, PERMUTATIONS), np.uint16)  # one row more, for those that are left out
        at = 0
        self._signatures.reverse()
        while self._signatures:
            part = self._signatures.pop()
            kept[place[at : at + len(part)]] = part
            at += len(part)
        return kept[:-1]


def _pairs(ledger: Ledger, index: np.ndarray, others: np.ndarray) -> tuple[str, ...]:
    return tuple(f"{ledger.where(i)} ~ {ledger.where(j)}" for i, j in zip(index[:SHOWN], others[:SHOWN]))


def divided(length: int, words: list[str]) -> list[str]:
    """The words of a text of `length` characters; its characters, where spaces do not separate words."""
    return words if length < 15 * len(words) else list("".join(words))


def shingles(words: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes u64[N] of all three-word shingles, once for each text, and the index of their text i64[N]."""
    counts = np.array([len(w) for w in words], np.int64)
    flat = np.fromiter(map(crc32, map(str.encode, chain.from_iterable(words))), np.uint64, int(counts.sum()))
    owner = np.repeat(np.arange(len(words)), counts)
    if len(flat) < SHINGLE:
        return flat[:0], owner[:0]
    n = len(flat) - SHINGLE + 1
    mixed = np.zeros(n, np.uint64)
    for k in range(SHINGLE):
        mixed = (mixed ^ flat[k : k + n]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    inside = owner[:n] == owner[SHINGLE - 1 :]
    mixed, owner = mixed[inside], owner[:n][inside]
    order = np.lexsort((mixed, owner))
    mixed, owner = mixed[order], owner[order]
    fresh = np.ones(len(mixed), bool)
    fresh[1:] = (mixed[1:] != mixed[:-1]) | (owner[1:] != owner[:-1])
    return mixed[fresh], owner[fresh]


def template(hashes: np.ndarray, owner: np.ndarray, rows: int) -> np.ndarray:
    """Shingles that occur in many rows."""
    if rows < SAMPLE:
        return hashes[:0]
    values, counts = np.unique(hashes, return_counts=True)
    return values[counts > TEMPLATE * rows]


def signatures(hashes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return MinHash signatures u16[R, PERMUTATIONS] of R sets, given one after another with their sizes."""
    from rensa import RMinHash

    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    made = RMinHash.digest_matrix_from_flat_token_hashes(np.ascontiguousarray(hashes), offsets, PERMUTATIONS, SEED)
    return np.array(made.to_rows(), np.uint32).astype(np.uint16)


def similar_pairs(kept: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (later, earlier) positions of rows whose signatures agree in `threshold` of their entries or more.

    In a bucket of a band, a row is compared with the first one and with the one before it, so work stays linear however
    many rows are alike.
    """
    bands = np.ascontiguousarray(kept).view(np.uint64)
    found = []
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        keys = band[order]
        equal = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        if len(equal):
            bucket = np.searchsorted(keys, keys[equal])
            found.append(np.stack([order[equal], order[bucket]]))
            found.append(np.stack([order[equal], order[equal - 1]]))
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    later, earlier = np.unique(np.concatenate(found, axis=1), axis=1)
    near = np.concatenate(
        [
            (kept[later[at : at + 65536]] == kept[earlier[at : at + 65536]]).mean(1) >= threshold
            for at in range(0, len(later), 65536)
        ]
    )
    return later[near], earlier[near]


def superfluous(later: np.ndarray, earlier: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (copies, originals); every original is among the rows that stay. `later` must be sorted."""
    original: dict[int, int] = {}
    for j, i in zip(later.tolist(), earlier.tolist()):
        if j not in original and i not in original:
            original[j] = i
    return np.array(list(original), np.int64), np.array(list(original.values()), np.int64)
