"""Checkpoints: the whole TrainState by Orbax, without a device axis.

So a run can go on from one on any number of devices. A checkpoint is written beside its place and
renamed when it is complete: a process killed at any moment leaves the last complete one. Restored
bits equal saved bits.
"""

import logging
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from collab_jax.runtime.errors import UserError


class Checkpoints:
    """The checkpoints of a run, in `folder`; the last two are kept."""

    def __init__(self, folder: pathlib.Path):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs each file that it writes
        self.folder = folder.absolute()
        processes = ocp.options.MultiprocessingOptions()
        if jax.process_count() > 1:  # each reads for itself, one writes, and none waits for others
            me = jax.process_index()
            processes = ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"host{me}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            create=False,
            enable_async_checkpointing=False,
            multiprocessing_options=processes,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Returns the step of the last complete checkpoint, or None."""
        return self._manager.latest_step()

    def has(self, step: int) -> bool:
        """Returns whether there is a complete checkpoint of this step."""
        return step in self._manager.all_steps()

    def save(self, step: int, state: Any) -> None:
        """Saves a pytree of host arrays; durable on return."""
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._manager.wait_until_finished()

    def restore(self, like: Any) -> Any:
        """Returns the last checkpoint as host arrays.

        Its structure, shapes and dtypes must be those of `like`. Raises UserError where they are
        not, or where the checkpoint is damaged or absent.
        """
        if (step := self.latest()) is None:
            raise UserError(f"{self.folder} has no checkpoint: start the run anew")
        place = self.folder / str(step)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), like
        )
        try:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax raises many kinds for a damaged or foreign checkpoint
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(
                f"cannot restore checkpoint {place} ({reason}): if it is damaged, delete that "
                "folder and the run goes on from the one before; if the model's shape changed, "
                "or an older version wrote it, use another --workdir"
            ) from None
        wrong = [
            (np.shape(got), want.shape)
            for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True)
            if np.shape(got) != want.shape
        ]
        if wrong:
            raise UserError(
                f"checkpoint {place} holds shape {wrong[0][0]} where this model has {wrong[0][1]}: "
                "use another --workdir"
            )
        return jax.device_get(state)
