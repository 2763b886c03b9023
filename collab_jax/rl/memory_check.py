"""A memory plan against the memory that there is; what does not fit is refused, with what would.

An accelerator has memory of its own, and the host's is planned apart. Host devices share the memory
of the machine with the process that they are in.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from collab_jax.models.decoder import DecoderConfig
from collab_jax.rl.memory_plan import GIB, PURPOSES, TRAINING, Plan, Work
from collab_jax.runtime import hosts, markdown
from collab_jax.runtime.errors import UserError

# Overrides of the config by flat key, "train.micro_rows"; "devices" is the number of devices.
Changes = dict[str, Any]


class Machine(NamedTuple):
    """Devices and their memory: of each accelerator, or, of host devices, that of the host."""

    devices: int
    memory: float  # bytes
    cpu: bool = False

    def needs(self, plan: Plan) -> float:
        """The bytes of `memory` that a plan needs."""
        return plan.on_host + self.devices * plan.on_device if self.cpu else plan.on_device


def this_machine() -> Machine:
    """The devices of this process."""
    devices = jax.local_device_count()
    if jax.default_backend() == "cpu":
        return Machine(devices, host_memory(), cpu=True)
    stats = jax.local_devices()[0].memory_stats() or {}
    return Machine(devices, float(stats.get("bytes_limit", host_memory())))


def host_memory() -> float:
    """Bytes that this process may use: those of the machine, or of its control groups (v2).

    Other processes of a job on the same machine are not counted.
    """
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in limits(pathlib.Path("/proc/self/cgroup"), pathlib.Path("/sys/fs/cgroup")):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            total = min(total, float(text))
    return total


def limits(own: pathlib.Path, root: pathlib.Path) -> list[pathlib.Path]:
    """The files that may limit the memory of a process: of its control group and all above it.

    own: tells the groups; root: where they are mounted.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    paths = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    group = root / (paths[0] if paths else "")
    above = [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return [folder / "memory.max" for folder in above]


def table(plan: Plan, machine: Machine) -> str:
    """The plan as a Markdown table, and a line with its sum against the memory of the machine.

    In GiB; a plan of less than 1 GiB in MiB.
    """
    needed, n = machine.needs(plan), machine.devices
    unit, size = ("GiB", GIB) if needed >= GIB else ("MiB", 2**20)
    names = ("held", "in an update, besides", "or in sampling")
    rows = []
    for name, sizes in zip(names, (plan.held, plan.update, plan.sampling), strict=True):
        cells = [f"{sizes[p] / size:.1f}" if sizes.get(p) else "" for p in PURPOSES]
        rows.append((name, *cells, f"{sum(sizes.values()) / size:.1f}"))
    head = (f"{unit} on each of {n} device{'s' * (n > 1)}", *PURPOSES, "sum")
    parts = ", ".join(f"{name} {b / size:.1f}" for name, b in plan.host.items() if b)
    host = f"{plan.on_host / size:.1f} on the host ({parts})"
    at_most = f"at most {needed / size:.1f} of {machine.memory / size:.1f} {unit}"
    if machine.cpu:
        at_most += f": {n} x {plan.on_device / size:.1f} and {host}"
    else:
        at_most += f" on a device, and {host}"
    return f"{markdown.table(head, rows)}\n{at_most}"


def smaller_settings(config: ConfigDict, devices: int, work: Work) -> Iterator[Changes]:
    """Settings that need less memory: those that change fewest first, the mildest first."""
    section, key = work.micro_rows.split(".")
    rows, several = config[section][key], devices * hosts.count() > 1
    options = {
        work.micro_rows: [n for n in (rows // 2, rows // 4, 1) if 1 <= n < rows],
        "train.sharded": [True] if several and not config.train.sharded else [],
        "train.remat": [True],
        "train.logprob_chunk": [16],
        "decode.cache_dtype": ["bfloat16"],
        "decode.slot_counts": [1] if config.decode.slot_counts > 1 else [],
        "model.param_dtype": ["bfloat16"],
        "lora.rank": [] if config.lora.rank else [16],
        "devices": [n * devices for n in (2, 4, 8) if config.prompts_per_step % (n * devices) == 0],
    }
    for count in range(1, len(options) + 1):
        for keys in itertools.combinations(options, count):
            for values in itertools.product(*(options[key] for key in keys)):
                yield dict(zip(keys, values, strict=True))


def changed(
    cfg: DecoderConfig, config: ConfigDict, changes: Changes
) -> tuple[DecoderConfig, ConfigDict]:
    """The model and the config under `changes`."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(
        {key: value for key, value in changes.items() if key != "devices"}
    )
    return dataclasses.replace(cfg, remat=config.train.remat), config


def settings_that_fit(
    cfg: DecoderConfig, config: ConfigDict, machine: Machine, work: Work = TRAINING
) -> Changes | None:
    """The first of `smaller_settings` with which the work fits the machine's memory, or None."""
    for changes in smaller_settings(config, machine.devices, work):
        smaller_cfg, smaller = changed(cfg, config, changes)
        other = machine._replace(devices=changes.get("devices", machine.devices))
        plan = work.plan(smaller_cfg, smaller, other.devices, other.cpu)
        if other.needs(plan) <= other.memory:
            return changes
    return None


def check_fits(
    cfg: DecoderConfig, config: ConfigDict, machine: Machine, work: Work = TRAINING
) -> str:
    """The plan of the work on a machine, as text.

    Raises UserError, with the plan and with settings that would fit, where it needs more.
    """
    plan = work.plan(cfg, config, machine.devices, machine.cpu)
    shown, needed = table(plan, machine), machine.needs(plan)
    if needed <= machine.memory:
        return shown
    changes = settings_that_fit(cfg, config, machine, work)
    if changes is None:
        advice = "no setting makes it fit: use a smaller model, group or max_new_tokens"
    else:
        flags = [f"--config.{key}={value}" for key, value in changes.items() if key != "devices"]
        more = [f"{changes['devices']} devices"] if "devices" in changes else []
        advice = f"it fits with {' and '.join(flags + more)}"
    where = "of this machine" if machine.cpu else f"on each of {machine.devices} devices"
    raise UserError(
        f"this run needs about {needed / GIB:.3g} GiB {where}, "
        f"of {machine.memory / GIB:.3g}: {advice}\n{shown}"
    )
