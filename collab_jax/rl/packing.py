"""Packing: several demonstrations in one row of tokens, so that little of a batch is padding.

A token attends to those before it in its own demonstration alone, and positions begin anew with
each: a packed demonstration gives the same loss as one that has a row to itself. W is the number of
columns of a row, N that of the tokens that it may teach.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from collab_jax.rl.demonstrations import Encoded


class PackedRows(NamedTuple):
    """R rows, on the host or traced."""

    tokens: Any  # i32[R, W]
    segment: Any  # i32[R, W], which of its row's demonstrations a token is of, from 1; 0: padding
    positions: Any  # i32[R, W], in its demonstration
    at: Any  # i32[R, N], the column that predicts a taught token
    targets: Any  # i32[R, N], the taught token
    taught: Any  # bool[R, N], where there is one
    states: Any  # bool[R, N], where it comes of a decision state (`Encoded.states`)


def columns(config: ConfigDict) -> int:
    """W of a config: room for two demonstrations of the greatest length, or for more short ones."""
    return 2 * (config.prompt_length + config.max_new_tokens)


def taught_tokens(config: ConfigDict) -> int:
    """N of a config: half the columns, or, where responses are longer than prompts, two of them.

    A row is full when either runs out; the head is computed for all N.
    """
    return config.max_new_tokens + max(config.prompt_length, config.max_new_tokens)


def pack(
    encoded: Sequence[Encoded], width: int, teaches: int, pad_id: int, multiple: int = 1
) -> PackedRows:
    """Rows of W = `width` columns and N = `teaches` taught tokens that hold the demonstrations.

    The longest goes first, each into the first row that has room for it. Empty rows are added up to
    a multiple of `multiple`. A demonstration that fits no row is the caller's mistake.
    """
    rows: list[list[Encoded]] = []
    room: list[tuple[int, int]] = []  # columns and taught tokens that are left in each row
    for one in sorted(encoded, key=lambda one: -one.columns):
        assert one.columns <= width and one.learnt <= teaches
        fits = (i for i, (w, n) in enumerate(room) if one.columns <= w and one.learnt <= n)
        i = next(fits, len(rows))
        if i == len(rows):
            rows.append([])
            room.append((width, teaches))
        rows[i].append(one)
        room[i] = room[i][0] - one.columns, room[i][1] - one.learnt
    rows += [[] for _ in range(-len(rows) % multiple)]
    return _filled(rows, width, teaches, pad_id)


def _filled(rows: Sequence[Sequence[Encoded]], width: int, teaches: int, pad_id: int) -> PackedRows:
    """The arrays of rows of demonstrations."""
    R = len(rows)
    tokens = np.full((R, width), pad_id, np.int32)
    segment, positions = np.zeros((2, R, width), np.int32)
    at, targets = np.zeros((2, R, teaches), np.int32)
    taught, states = np.zeros((2, R, teaches), bool)
    for r, row in enumerate(rows):
        start = n = 0
        for number, one in enumerate(row, 1):
            ids, columns = [*one.prompt, *one.response], one.columns
            tokens[r, start : start + columns] = ids[:-1]
            segment[r, start : start + columns] = number
            positions[r, start : start + columns] = np.arange(columns)
            new = slice(n, n + one.learnt)
            at[r, new] = start + columns - one.learnt + np.arange(one.learnt)
            targets[r, new], taught[r, new] = ids[-one.learnt :], True
            states[r, n : n + one.states] = True
            start, n = start + columns, n + one.learnt
    return PackedRows(tokens, segment, positions, at, targets, taught, states)
