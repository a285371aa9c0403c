"""Best-fit decreasing bin packing: several short rows in one of `capacity` tokens."""

import numpy as np


def pack(lengths: np.ndarray, capacity: int, most: int | None = None) -> list[list[int]]:
    """Put items of `lengths` i[N] into bins of `capacity`, `most` in one at most; return the items of each bin.

    Items are placed from the longest to the shortest (equal ones in the given order), each into the fullest bin with
    room, which a bitmap of free room finds. Raises ValueError for an item above capacity.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"an item of {int(lengths.max())} does not fit into {capacity}")
    bins: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # room -> bins with exactly that much left
    rooms = 0  # bit r is set where open_bins[r] is not empty
    for item in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[item])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        left = room - size
        if left and (most is None or len(bins[chosen]) < most):
            open_bins[left].append(chosen)
            rooms |= 1 << left
    return bins
