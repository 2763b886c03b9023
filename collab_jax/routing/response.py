"""Routers that read the device's finished response: by log-probability, and by the trained marker."""

import numpy as np

from collab_jax.records import Records

_FIRST = 1e6  # above every margin and every summed log-probability


def no_answer(records: Records) -> np.ndarray:
    """bool[n]: with the marker disallowed, cut off or not well formed. There is nothing to deliver,
    so it is sent first.
    """
    return ~(records["ended"] & records["formatted"])


def logprob(records: Records) -> np.ndarray:
    """The log-probability gate: minus the response's summed log-probability; what has no answer
    first, in that order too.
    """
    return -records["logp"] + _FIRST * no_answer(records)


def margin(records: Records) -> np.ndarray:
    """The trained decision: max_t m_t with the marker disallowed; what has no answer first, by
    margin too.
    """
    first = no_answer(records)
    return np.where(
        first, np.maximum(records["margin"], -_FIRST / 2) + _FIRST, records["margin"]
    )  # -inf: no decision state
