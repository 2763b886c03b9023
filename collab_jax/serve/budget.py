"""The budget, live: a controller of the bias, and a hard limit; pure functions, no clock, no jax.

The share of queries that go to the cloud is held by two means. The bias follows
`calibration.track`: it falls with a call and rises without one. That alone leaves a debt of calls
behind when the traffic has changed: as many as it took to move the bias. So the bias also moves, a
little with each query, by the debt, until there is none. A token bucket is filled by the target
with each query and gives a token for each call: whatever the margins do, the first n queries have
at most target * n + BURST calls, and any n of them at most target * n + CAPACITY.

Only what the device decided counts: neither a query whose client chose for itself, nor one that
came while no call was admitted, as the cloud was down (the controller is frozen then).
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from collab_jax.routing.calibration import LIMIT, Tracker, track
from collab_jax.runtime import files
from collab_jax.runtime.errors import UserError

BURST = 20.0  # calls that may be ahead of the target; one point of 2,000 queries
CAPACITY = 3 * BURST  # calls that a quiet time may save up
# Steps of the bias for each call of debt. Where the rate rises by 1 over the margins' spread, which
# is 50 steps, a quarter of 1 / 50 brings the debt back without swinging.
LEARN = 0.005
MOST_DEBT = 50.0  # calls; more would move the bias long after its cause
STEP, SPAN = 0.2, 20.0  # of a model without a calibration, in logits: a step, and the limits


class Point(NamedTuple):
    """A bias and the call rate that it was calibrated for."""

    rate: float
    bias: float


class State(NamedTuple):
    """What changes from query to query, and what an operator may set: tracker.budget."""

    tracker: Tracker
    bucket: float  # calls that may be made now
    debt: float = 0.0  # calls too few that were wanted, since the target was set
    queries: int = 0  # since the target was set
    calls: int = 0  # of these
    epoch: int = 0  # how often it was set


class Ticket(NamedTuple):
    """A call that was granted: the epoch and the target of that moment."""

    epoch: int
    target: float


def start(calibration: dict[str, Any] | None, target: float) -> State:
    """The state before the first query, from the contents of collab_config.json, or None."""
    if calibration is None:
        return State(Tracker(0.0, target, STEP, -SPAN, SPAN), BURST)
    tracking = calibration["tracking"]
    bias = bias_for(points(calibration), target)
    tracker = Tracker(
        bias=min(max(calibration["bias"] if bias is None else bias, tracking["low"]), LIMIT),
        budget=target,
        step=tracking["step"],
        low=tracking["low"],
        high=tracking["high"],
    )
    return State(tracker, BURST)


def points(calibration: dict[str, Any] | None) -> list[Point]:
    """The calibrated biases, by rising rate; none without a calibration."""
    rows = calibration["biases"] if calibration else []
    return sorted(Point(row["rate"], row["bias"]) for row in rows)


def bias_for(table: Sequence[Point], rate: float) -> float | None:
    """The bias for a call rate, between calibrated ones by a straight line; None without any."""
    if rate in (0, 1):
        return -math.inf if rate == 0 else LIMIT
    if not table:
        return None
    rates, biases = zip(*table, strict=True)
    return float(np.interp(rate, rates, biases))


def decide(state: State, wanted: bool) -> tuple[State, bool]:
    """(the state after a query, whether it may go to the cloud); wanted: the margin says so.

    Where the bucket is empty, the bias learns what was wanted: else it would rise, while calls are
    refused, and call even more afterwards.
    """
    target = state.tracker.budget
    debt = min(max(state.debt + target - wanted, -MOST_DEBT), MOST_DEBT)
    tracker = _moved(track(state.tracker, wanted), LEARN * debt)
    bucket = min(CAPACITY, state.bucket + target)
    granted = wanted and bucket >= 1 and target > 0
    after = State(
        tracker=tracker,
        bucket=bucket - granted,
        debt=debt,
        queries=state.queries + 1,
        calls=state.calls + granted,
        epoch=state.epoch,
    )
    return after, granted


def _moved(tracker: Tracker, steps: float) -> Tracker:
    """The tracker with its bias some steps higher, within its limits."""
    bias = min(max(tracker.bias + tracker.step * steps, tracker.low), tracker.high)
    return tracker._replace(bias=bias)


def take_back(state: State, ticket: Ticket) -> State:
    """The state as if a query that was granted its call, which failed, had not been.

    Where another target was set meanwhile, its token alone comes back.
    """
    undone = 1 - ticket.target
    state = state._replace(bucket=min(CAPACITY, state.bucket + undone))
    if ticket.epoch != state.epoch:
        return state
    return state._replace(
        tracker=_moved(state.tracker, undone - LEARN * state.debt),
        debt=min(state.debt + undone, MOST_DEBT),
        queries=state.queries - 1,
        calls=state.calls - 1,
    )


def retarget(state: State, table: Sequence[Point], target: float) -> State:
    """The state with another target in [0, 1].

    The bias moves by what lies between the two calibrated ones, and so keeps what it has learned of
    the traffic. Nothing and everything need no bias: there it stays what it was.
    """
    old, bias = state.tracker, state.tracker.bias
    before, after = bias_for(table, old.budget), bias_for(table, target)
    if before is not None and after is not None and not {old.budget, target} & {0, 1}:
        bias = min(max(bias + after - before, old.low), old.high)
    return State(old._replace(budget=target, bias=bias), state.bucket, epoch=state.epoch + 1)


class Controller:
    """The state of a server, kept in a file. To be used by one thread.

    path: of the state, a small JSON file; it holds for one model with one calibration, and that of
    another is not read.
    Raises UserError for a file that is not a state.
    """

    def __init__(
        self, path: pathlib.Path, model: str, calibration: dict[str, Any] | None, target: float
    ):
        self.path, self.model, self.table = path, model, points(calibration)
        self._calibration = hashlib.sha256(json.dumps(calibration).encode()).hexdigest()
        self.state = start(calibration, target)
        self._saved: State | None = None
        if path.exists():
            self._restore()

    @property
    def bias(self) -> float:
        """The bias of the next query."""
        target = self.state.tracker.budget
        if target in (0, 1):
            return -math.inf if target == 0 else LIMIT
        return self.state.tracker.bias

    def decide(self, wanted: bool) -> Ticket | None:
        """Counts a query; returns a ticket where it may go to the cloud."""
        self.state, granted = decide(self.state, wanted)
        return Ticket(self.state.epoch, self.state.tracker.budget) if granted else None

    def take_back(self, ticket: Ticket) -> None:
        """Forgets a query whose call failed."""
        self.state = take_back(self.state, ticket)

    def set_target(self, target: float) -> None:
        """Sets the share of queries that may go to the cloud, in [0, 1]."""
        self.state = retarget(self.state, self.table, target)

    def bias_for(self, rate: float) -> float | None:
        """The calibrated bias for a rate; None where nothing was calibrated."""
        return bias_for(self.table, rate)

    def report(self) -> dict[str, Any]:
        """The budget as clients see it."""
        state = self.state
        return {
            "target_call_rate": state.tracker.budget,
            "achieved_call_rate": state.calls / state.queries if state.queries else None,
            "queries": state.queries,
            "calls": state.calls,
            "bias": state.tracker.bias,
            "calls_left_in_bucket": state.bucket,
        }

    def save(self) -> None:
        """Writes the state, if it has changed."""
        state = self.state
        if state == self._saved:
            return
        contents = {"model": self.model, "calibration": self._calibration, **state._asdict()}
        contents["tracker"] = state.tracker._asdict()
        files.write_text(self.path, json.dumps(contents, indent=2) + "\n")
        self._saved = state

    def _restore(self) -> None:
        try:
            contents = json.loads(self.path.read_text())
            of = contents.pop("model"), contents.pop("calibration", None)
            tracker = Tracker(**contents.pop("tracker"))
            state = State(tracker=tracker, **contents)
            if of == (self.model, self._calibration):
                self.state = state
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f"{self.path} is not a server's state: delete it, and the calibrated bias is the "
                "start again"
            ) from None
