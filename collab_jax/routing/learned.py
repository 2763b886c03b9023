"""Routers fitted by scikit-learn, on records of other prompts, to tell what the device gets wrong.

Each takes (records to fit on, records to route) and returns the probability that the device is
wrong, f64[n].
"""

import re
from collections.abc import Sequence

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from collab_jax.records import Records
from collab_jax.routing.response import FIRST, no_answer
from collab_jax.runtime.errors import UserError

NUMBERS = 8  # of a prompt that become features, in their order and sorted


def prompt_features(prompts: Sequence[str] | np.ndarray) -> np.ndarray:
    """Features f64[n, F] of n texts.

    They are lengths, counts of kinds of characters, and the first NUMBERS numbers in the text (0
    where there are fewer).
    """
    rows = []
    for text in prompts:
        numbers = [float(x) for x in re.findall(r"\d{1,15}(?:\.\d{1,15})?", text)]
        first = (numbers + [0.0] * NUMBERS)[:NUMBERS]
        kinds = [
            sum(map(is_kind, text))
            for is_kind in (str.isdigit, str.isalpha, str.isupper, str.isspace)
        ]
        lengths = [len(text), len(text.split()), text.count("\n")]
        rows.append([*lengths, *kinds, len(numbers), *first, *sorted(first)])
    return np.array(rows, float).reshape(len(rows), -1)


def linear(fit_on: Records, records: Records) -> np.ndarray:
    """Logistic regression on `prompt_features` and their squares, standardised."""
    return fit(logistic(), _with_squares(fit_on), fit_on, _with_squares(records))


def _with_squares(records: Records) -> np.ndarray:
    features = prompt_features(records["prompt"])
    return np.concatenate([features, features**2], axis=1)


def trees(fit_on: Records, records: Records) -> np.ndarray:
    """Gradient-boosted trees on `prompt_features`."""
    model = HistGradientBoostingClassifier(random_state=0)
    return fit(model, prompt_features(fit_on["prompt"]), fit_on, prompt_features(records["prompt"]))


def margin_logprob(fit_on: Records, records: Records) -> np.ndarray:
    """Logistic regression on margin and log-probability, fitted where there is an answer.

    Responses without an answer come first.
    """
    answered = ~no_answer(fit_on)
    known = {name: fit_on[name][answered] for name in ("margin", "logp", "local_correct")}
    wrong = fit(logistic(), _margin_and_logp(known), known, _margin_and_logp(records))
    return wrong + FIRST * no_answer(records)


def _margin_and_logp(records: Records) -> np.ndarray:
    """f64[n, 2], clipped: a margin is -inf where there was no decision state."""
    return np.clip(np.stack([records["margin"], records["logp"]], axis=1), -1e3, 1e3)


def logistic() -> Pipeline:
    """Logistic regression on standardised features."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def has_classes(fit_on: Records) -> bool:
    """Whether every learned router can be fitted: some answered prompts are right, some wrong."""
    return len(np.unique(fit_on["local_correct"][~no_answer(fit_on)])) == 2


def check_classes(fit_on: Records) -> None:
    """Raises UserError where the device is right on all prompts to fit on, or on none."""
    wrong = ~fit_on["local_correct"]
    if wrong.all() or not wrong.any():
        verdict = "wrong" if wrong.all() else "right"
        raise UserError(
            f"a router cannot be fitted: the device is {verdict} on all {len(wrong)} prompts to "
            "fit on"
        )


def fit(
    model: Pipeline | HistGradientBoostingClassifier,
    features: np.ndarray,
    fit_on: Records,
    to_score: np.ndarray,
) -> np.ndarray:
    """Probability f64[n] that the device is wrong, by a classifier that is fitted here.

    features f[m, F] are of the m rows of `fit_on`, to_score f[n, F] of the rows to score.
    """
    check_classes(fit_on)
    return model.fit(features, ~fit_on["local_correct"]).predict_proba(to_score)[:, 1]
