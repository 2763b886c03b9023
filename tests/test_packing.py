"""Packing: where each demonstration's tokens lie, by hand and by what every packing must keep."""

import numpy as np
import pytest

from collab_jax.rl import packing
from collab_jax.rl.demonstrations import Encoded


def test_two_in_one_row_by_hand():
    first, second = Encoded([1, 2, 3], [4, 5], 2, states=1), Encoded([6], [7, 8, 9], 1)
    rows = packing.pack([second, first], width=9, teaches=4, pad_id=0)
    # The last token of each is never read. The longer one goes first.
    np.testing.assert_array_equal(rows.tokens, [[1, 2, 3, 4, 6, 7, 8, 0, 0]])
    np.testing.assert_array_equal(rows.segment, [[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 0, 1, 2, 0, 0]])
    np.testing.assert_array_equal(rows.taught, [[True, True, True, False]])
    np.testing.assert_array_equal(rows.states, [[True, False, False, False]])
    np.testing.assert_array_equal(rows.at[rows.taught], [2, 3, 6])
    np.testing.assert_array_equal(rows.targets[rows.taught], [4, 5, 9])


@pytest.mark.parametrize("multiple", [1, 4])
def test_each_is_in_one_row_once(multiple):
    rng = np.random.default_rng(0)
    encoded = []
    for number in range(40):
        response = [1000 + number] * int(rng.integers(1, 9))
        learnt = int(rng.integers(1, len(response) + 1))
        encoded.append(Encoded([number] * int(rng.integers(1, 12)), response, learnt))
    rows = packing.pack(encoded, width=40, teaches=16, pad_id=-1, multiple=multiple)
    assert len(rows.tokens) % multiple == 0
    assert rows.taught.sum() == sum(one.learnt for one in encoded)
    found = []
    for tokens, segment, positions in zip(rows.tokens, rows.segment, rows.positions, strict=True):
        for number in range(1, segment.max() + 1):
            own = tokens[segment == number]
            np.testing.assert_array_equal(positions[segment == number], np.arange(len(own)))
            found.append(own.tolist())
    assert sorted(found) == sorted([*one.prompt, *one.response[:-1]] for one in encoded)
    assert (rows.tokens[rows.segment == 0] == -1).all()
    # Nothing that would have fitted into an earlier row begins a row of its own.
    assert (rows.segment > 0).mean() > 0.7 or multiple > 1


def test_a_row_teaches_no_more_than_it_has_room_for():
    encoded = [Encoded([1], [2, 3, 4], 3)] * 3
    rows = packing.pack(encoded, width=20, teaches=6, pad_id=0)
    np.testing.assert_array_equal(rows.taught.sum(1), [6, 3])
