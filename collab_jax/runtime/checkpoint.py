"""Checkpoints: the whole TrainState by Orbax, without a device axis, so that any number of devices
can go on from one.

A checkpoint is written beside its place and renamed when complete: a process killed at any moment
leaves the last complete one. Restored bits equal saved bits.
"""

import logging
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from collab_jax.runtime.errors import UserError


class Checkpoints:
    """The checkpoints of a run, in `folder`, the last two kept."""

    def __init__(self, folder: pathlib.Path):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of each file it writes
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Step of the last complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Saves a host pytree, durable on return; a step already saved is left as it is."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))
            self._manager.wait_until_finished()

    def restore(self, like: Any) -> Any:
        """The last checkpoint as host arrays with the structure, shapes and dtypes of `like`.
        Raises UserError otherwise.
        """
        step = self.latest()
        place = self.folder / str(step)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), like
        )
        try:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax raises many kinds for a damaged or foreign checkpoint
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(
                f"cannot restore checkpoint {place} ({reason}): if it is damaged, delete that folder and the run goes on from "
                "the one before; if the model's shape changed, use another --workdir"
            ) from None
        wrong = [
            (np.shape(got), want.shape)
            for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True)
            if np.shape(got) != want.shape
        ]
        if wrong:
            raise UserError(
                f"checkpoint {place} holds shape {wrong[0][0]} where this model has {wrong[0][1]}: use another --workdir"
            )
        return jax.device_get(state)
