"""Hosts: the processes of one job on several machines, and what they tell each other.

Each host has devices of its own; what all devices do together is in `parallel.py`. Beside that the
hosts exchange small texts through jax's coordination service, which host 0 runs: who was asked to
stop, which verdicts are missing, what the cloud said. All of them make the same calls in the same
order. A run of one process has one host, for which every function returns at once.
"""

import collections
import contextlib
import itertools
import json
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # the service's client has no public name

from collab_jax.runtime import process
from collab_jax.runtime.errors import UserError

JOIN_SECONDS = 120  # until all hosts have to be there
LOST_SECONDS = 60  # without a sign of life after which a host is lost, and all others end
LEAVE_SECONDS = 20  # that a host which has nothing to tell waits for the others to end
SECONDS = 3600.0  # that a host waits for what another one says, which may be compiling or saving
# That a host which failed waits for the others to hear of it. One that was asked to stop waits
# longer, but others may wait for one that failed in the middle of a sum, and would for ever.
FAILED_SECONDS = 600.0
FOREVER = 1e6  # for what has no bound of its own, as the cloud and routers that run the model
LOOK_SECONDS = 2.0  # between two looks whether a host that is waited for has failed

_FAILED, _STOPPED = "collab_jax/failed", "collab_jax/stopped"
_calls = itertools.count()
_said: collections.deque[str] = collections.deque()  # the keys of this host that others may read


def join(hosts: int, host: int | None, coordinator: str | None) -> None:
    """Makes this process one of so many hosts, before jax has looked for devices.

    host: its number; coordinator: address and port of host 0. Where both are None, the scheduler
    says so (a TPU slice, Slurm, Open MPI, Kubernetes), as far as jax knows it. Raises UserError
    where the hosts do not find each other, or are not as many as was asked for.
    """
    # The service would take SIGTERM, by which a run is asked to save.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            hosts,
            host,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=LOST_SECONDS,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the {hosts} hosts did not find each other ({reason}): start all of them within "
            f"{JOIN_SECONDS} s, with --hosts={hosts}, and, where no scheduler tells, --host=0 to "
            f"{hosts - 1} and the --coordinator=ADDRESS:PORT of host 0, which all can reach"
        ) from None
    if count() != hosts:
        raise UserError(f"--hosts={hosts}, but {count()} processes have started")
    devices = gathered("its devices", jax.local_device_count())
    if len(set(devices)) > 1:
        raise UserError(f"the hosts have {devices} devices: give each as many")


def count() -> int:
    """Returns how many hosts there are."""
    return jax.process_count()


def index() -> int:
    """Returns which of them this is, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Returns whether this is host 0, which writes files and buys from the cloud."""
    return index() == 0


def gathered(what: str, said: Any, seconds: float = SECONDS) -> list[Any]:
    """Returns what every host says, in their order; this one says `said`, which JSON can hold.

    what: names it in the message where a host says nothing within `seconds`, a UserError. Where one
    was asked to stop, this process ends with status STOPPED as well.
    """
    if count() == 1:
        return [said]
    client, call = _client(), next(_calls)
    place = f"collab_jax/{call}/{what}"
    client.key_value_set(f"{place}/{index()}", json.dumps(said))
    end = time.monotonic() + seconds
    heard = [json.loads(_awaited(place, host, what, end)) for host in range(count())]
    # Who is here has read all of the call before, so nobody needs those before that.
    _said.append(f"{place}/{index()}")
    if len(_said) > 2:
        client.key_value_delete(_said.popleft())
    return heard


def joined(what: str, rows: list[Any], seconds: float = SECONDS) -> list[Any]:
    """Returns the rows of every host, in their order; this one has `rows`. See `gathered`."""
    return [row for of_host in gathered(what, rows, seconds) for row in of_host]


def part(n: int) -> slice:
    """Returns which of n things are this host's; n is a multiple of the number of hosts."""
    size = n // count()
    return slice(index() * size, (index() + 1) * size)


def _client() -> Any:
    client = distributed.global_state.client
    assert client is not None
    return client


def _awaited(place: str, host: int, what: str, end: float) -> str:
    """Returns what a host says at a place, once it does; `end` is a time.monotonic()."""
    while True:
        patience = max(min(LOOK_SECONDS, end - time.monotonic()), 0.001)
        try:
            return _client().blocking_key_value_get(f"{place}/{host}", int(1000 * patience))
        except jax.errors.JaxRuntimeError as error:
            kind = str(error).split(":")[0]
        failed, stopped = [], []
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # where host 0 is no more
            failed = _client().key_value_dir_get(_FAILED)
            stopped = _client().key_value_dir_get(_STOPPED)
        for key, problem in failed:
            raise UserError(f"host {key.rpartition('/')[2]} failed: {problem}")
        if stopped:
            sys.exit(process.STOPPED)
        if kind != "DEADLINE_EXCEEDED" or time.monotonic() >= end:
            raise UserError(
                f"host {host} of {count()} has not told {what} ({kind}): see its own output; once "
                "it can run, the same command on all hosts goes on from the last checkpoint"
            )


@contextlib.contextmanager
def failure_told() -> Iterator[None]:
    """An error that leaves the body is told to the hosts that wait for this one, and ends them.

    So is a stop that was asked for, by which they end as this one does. They hear of it when they
    next wait for this host, which stays until then: where one is no more, jax ends the others.
    """
    try:
        yield
    except SystemExit as stop:
        if stop.code == process.STOPPED:
            _tell(_STOPPED, "")
            _wait_for_the_others(SECONDS)
        raise
    except Exception as error:
        problem = str(error) if isinstance(error, UserError) else repr(error)
        _tell(_FAILED, " ".join(problem.split()))
        _wait_for_the_others(FAILED_SECONDS)
        raise


def _wait_for_the_others(seconds: float) -> None:
    """Waits until all hosts have told that they end; a signal ends this one at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    end = time.monotonic() + seconds
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # where host 0 is no more
        while time.monotonic() < end:
            told = [_client().key_value_dir_get(place) for place in (_FAILED, _STOPPED)]
            if len({key.rpartition("/")[2] for keys in told for key, _ in keys}) == count():
                return
            time.sleep(LOOK_SECONDS)


def _tell(place: str, text: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # where host 0 is no more
        _client().key_value_set(f"{place}/{index()}", text)


@contextlib.contextmanager
def first_alone(what: str, seconds: float = SECONDS) -> Iterator[None]:
    """The body runs on host 0 and, once that is done, on the others.

    So files that each would make are made by one. A UserError on one host is one on all.
    """
    if not is_first() and (problem := gathered(what, None, seconds)[0]):
        raise UserError(f"host 0: {problem}")
    own = None
    try:
        yield
    except UserError as error:
        own = error
    said = None if own is None else str(own)
    if is_first():
        gathered(what, said, seconds)
        if own is not None:  # by now the others know
            raise own
    for host, problem in enumerate(gathered(f"{what} everywhere", said, seconds)):
        if problem:
            raise own or UserError(f"host {host}: {problem}")


def check_same(what: str, said: dict[str, Any]) -> None:
    """Raises UserError, on every host, where they do not say the same, with what differs."""
    first, *others = gathered(what, said)
    for host, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise UserError(
                    f"host {host} has {key}={other.get(key)!r}, host 0 has {first.get(key)!r}: "
                    "start all hosts with the same code, settings and data"
                )
