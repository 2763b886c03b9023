"""Routers that read the device's finished response: log-probability, and the trained marker."""

import numpy as np

from collab_jax.records import Records

FIRST = 1e6  # above every margin and every summed log-probability


def no_answer(records: Records) -> np.ndarray:
    """bool[n]: the response, marker disallowed, was cut off or is not well formed.

    There is nothing to deliver then, so such a prompt is sent first.
    """
    return ~(records["ended"] & records["formatted"])


def logprob(records: Records) -> np.ndarray:
    """The log-probability gate f64[n]: minus the response's summed log-probability.

    Responses without an answer come first, in the same order among themselves.
    """
    return -records["logp"] + FIRST * no_answer(records)


def margin(records: Records) -> np.ndarray:
    """The trained decision f64[n]: max_t m_t with the marker disallowed.

    Responses without an answer come first, by margin among themselves; -inf, where there was no
    decision state, counts as -FIRST / 2 there.
    """
    margins = records["margin"]
    return np.where(no_answer(records), np.maximum(margins, -FIRST / 2) + FIRST, margins)
