"""Routers fitted on records of other prompts to tell which ones the device gets wrong
(scikit-learn).

Each takes (records to fit on, records to route) and returns the probability that the device is
wrong, f64[n].
"""

import re

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from collab_jax.records import Records
from collab_jax.routing.response import _FIRST, no_answer
from collab_jax.runtime.errors import UserError

NUMBERS = 8  # of a prompt that become features, in their order and sorted


def prompt_features(prompts) -> np.ndarray:
    """f64[n, F] of n texts: their lengths, counts of kinds of characters, and the first numbers in
    them (0 where none).
    """
    rows = []
    for text in prompts:
        found = [float(x) for x in re.findall(r"\d{1,15}(?:\.\d{1,15})?", text)]
        first = (found + [0.0] * NUMBERS)[:NUMBERS]
        kinds = [
            sum(map(is_kind, text))
            for is_kind in (str.isdigit, str.isalpha, str.isupper, str.isspace)
        ]
        rows.append(
            [
                len(text),
                len(text.split()),
                text.count("\n"),
                *kinds,
                len(found),
                *first,
                *sorted(first),
            ]
        )
    return np.array(rows, float).reshape(len(rows), -1)


def linear(fit_on: Records, records: Records) -> np.ndarray:
    """Logistic regression on `prompt_features` and their squares, standardised."""
    both = lambda r: (lambda x: np.concatenate([x, x**2], axis=1))(prompt_features(r["prompt"]))  # noqa: E731
    return fit(logistic(), both(fit_on), fit_on, both(records))


def trees(fit_on: Records, records: Records) -> np.ndarray:
    """Gradient-boosted trees on `prompt_features`."""
    model = HistGradientBoostingClassifier(random_state=0)
    return fit(model, prompt_features(fit_on["prompt"]), fit_on, prompt_features(records["prompt"]))


def margin_logprob(fit_on: Records, records: Records) -> np.ndarray:
    """Logistic regression on margin and log-probability, fitted where there is an answer; what has
    none goes first.
    """
    answered = ~no_answer(fit_on)
    known = {name: fit_on[name][answered] for name in ("margin", "logp", "local_correct")}
    both = lambda r: np.clip(np.stack([r["margin"], r["logp"]], axis=1), -1e3, 1e3)  # noqa: E731  -inf: no decision state
    return fit(logistic(), both(known), known, both(records)) + _FIRST * no_answer(records)


def logistic():
    """Logistic regression on standardised features."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def has_classes(fit_on: Records) -> bool:
    """Whether the answered prompts hold right and wrong ones: each learned router can be fitted."""
    return len(np.unique(fit_on["local_correct"][~no_answer(fit_on)])) == 2


def check_classes(fit_on: Records) -> None:
    """Raises UserError where the device is right on all prompts to fit on, or on none."""
    wrong = ~fit_on["local_correct"]
    if wrong.all() or not wrong.any():
        one = "wrong" if wrong.all() else "right"
        raise UserError(
            f"a router cannot be fitted: the device is {one} on all {len(wrong)} prompts to fit on"
        )


def fit(model, features: np.ndarray, fit_on: Records, to_score: np.ndarray) -> np.ndarray:
    """Probability f64[n] that the device is wrong, of features f[n, F], by a classifier fitted on
    features f[m, F] of `fit_on`.
    """
    check_classes(fit_on)
    return model.fit(features, ~fit_on["local_correct"]).predict_proba(to_score)[:, 1]
