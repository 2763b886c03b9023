"""The routers that need the device model, by name: their scores are kept in the records.

Each is a function (Device, records to fit on or None, records to route) -> (score f64[n], device
tokens it spent f64[n]). `compare` reads the columns.
"""

import sys
from collections.abc import Callable, Sequence

import numpy as np

from collab_jax.models.decoder import Params
from collab_jax.records import Records
from collab_jax.rl.experiment import Run
from collab_jax.routing import agreement, classifier, forced, hidden, verification
from collab_jax.routing.device import Device
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example

RECORDED: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "agreement": agreement.score,
    "hidden": hidden.score,
    "classifier": classifier.score,
    "verification": verification.score,
    "token_margin": forced.token_margin,
    "policy_logprob": forced.policy_logprob,
}
LEARNED = ("hidden", "classifier")  # fitted on records of other prompts


def check(run: Run) -> None:
    """Raises UserError where a router of `config.routers.record` could not be recorded.

    To be called before anything is spent.
    """
    names, fit_prompts = run.config.routers.record, run.config.eval.fit_prompts
    if unknown := sorted(set(names) - set(RECORDED)):
        raise UserError(
            f"config.routers.record={tuple(names)}: no {unknown[0]!r} among {sorted(RECORDED)}"
        )
    if not fit_prompts and (learned := sorted(set(names) & set(LEARNED))):
        raise UserError(
            f"router {learned[0]} is learned: give it prompts with config.eval.fit_prompts"
        )
    for name, module in (("classifier", classifier), ("verification", verification)):
        if name in names:
            module.check(run)


def record(
    names: Sequence[str], device: Device, fit_on: Records | None, records: Records
) -> Records:
    """`records` with the columns score_NAME and tokens_NAME of each router.

    A router that fails, or that scores by NaN, is left out with a warning: the evaluation is worth
    more than its column.
    """
    columns = {}
    for name in names:
        try:
            score, tokens = RECORDED[name](device, fit_on, records)
        except UserError as error:
            print(f"warning: router {name} is left out: {error}", file=sys.stderr)
            continue
        if np.isnan(score).any():
            print(
                f"warning: router {name} is left out: {np.isnan(score).sum()} scores are NaN",
                file=sys.stderr,
            )
            continue
        columns |= {f"score_{name}": score, f"tokens_{name}": tokens}
    return records | columns


def with_routers(
    run: Run, params: Params, table: Records, examples: list[Example], fit_on: Records | None
) -> Records:
    """`table` with the columns of `config.routers.record` under params, which have the axis D.

    params: of the whole model. examples: those of both tables. Where two of them share an id a row
    could be either's, and nothing is recorded.
    """
    by_id = {example.id: example for example in examples}
    if run.config.routers.record and any(
        by_id[example.id].split != example.split for example in examples
    ):
        print(
            "warning: routers are left out: examples of two splits share an id; give each of its "
            "own",
            file=sys.stderr,
        )
        return table
    device = Device(run, params, by_id)
    return record(run.config.routers.record, device, fit_on, table)
