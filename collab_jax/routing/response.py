"""Routers by what one pass of the device has recorded: log-probability, marker, last result.

All but `first_margin` read the finished response.
"""

import re

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


def answer_logprob(records: Records) -> np.ndarray:
    """The log-probability gate on the answer's tokens alone, f64[n]; in order like `logprob`."""
    return -records["answer_logp"] + FIRST * no_answer(records)


def margin(records: Records) -> np.ndarray:
    """The trained decision f64[n]: max_t m_t with the marker disallowed.

    Responses without an answer come first, by margin among themselves; -inf, where there was no
    decision state, counts as -FIRST / 2 there.
    """
    return _no_answer_first(records, records["margin"])


def first_margin(records: Records) -> np.ndarray:
    """The decision before any attempt, f64[n]: m_t at the first decision state.

    Nothing is known then of how the response will end, so that one without an answer is no reason.
    """
    return records["first_margin"].astype(float)


def last_margin(records: Records) -> np.ndarray:
    """The decision where the answer opens, f64[n]: m_t at the last decision state; as `margin`."""
    return _no_answer_first(records, records["last_margin"])


def _no_answer_first(records: Records, margins: np.ndarray) -> np.ndarray:
    return np.where(no_answer(records), np.maximum(margins, -FIRST / 2) + FIRST, margins)


_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def last_result(records: Records) -> np.ndarray:
    """A control without a model, f64[n]: 1 where the last number of the thinking leads nowhere.

    It leads somewhere where it is the last number of the answer, or of the prompt (the target of
    Countdown). Responses without an answer come first.
    """
    lost = [
        _last_number(text.partition("<answer>")[0])
        not in (_last_number(text.partition("<answer>")[2]), _last_number(prompt))
        for prompt, text in zip(records["prompt"], records["text"], strict=True)
    ]
    return np.array(lost, float) + FIRST * no_answer(records)


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None
