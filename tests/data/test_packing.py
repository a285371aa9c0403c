import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.data.packing import pack


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(1, 5))
def test_no_bin_has_more_than_the_most(lengths, most):
    bins = pack(np.array(lengths, int), 64, most)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    assert all(len(members) <= most and sum(lengths[i] for i in members) <= 64 for members in bins)


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 70))
def test_every_item_once_and_no_bin_above_capacity(lengths, capacity):
    bins = pack(np.array(lengths, int), capacity)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= capacity for members in bins)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=100))
def test_as_good_as_best_fit_decreasing_done_slowly(lengths):
    rooms = []
    for size in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(60 - size)
    assert len(pack(np.array(lengths), 60)) == len(rooms)


def test_the_fullest_bin_with_room_is_chosen():
    assert pack(np.array([7, 5, 3, 4]), 10) == [[0, 2], [1, 3]]
    assert pack(np.zeros(0, int), 10) == []


def test_an_item_above_capacity():
    with pytest.raises(ValueError, match="11 does not fit into 10"):
        pack(np.array([3, 11]), 10)


def test_real_lengths_leave_little_room():
    lengths = np.random.default_rng(0).integers(20, 400, 5000)
    bins = pack(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) > 0.99
