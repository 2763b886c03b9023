"""Weights as safetensors files: one, or shards with an index, each written beside its place."""

import errno
import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import save_file

from collab_jax.runtime.files import replacing, write_text

SHARD_BYTES = 5_000_000_000  # of a file; a larger model is several, with an index
INDEX = "model.safetensors.index.json"


def write(
    folder: pathlib.Path,
    sizes: Mapping[str, int],
    weight: Callable[[str], np.ndarray | jax.Array],
) -> None:
    """Writes the weights of a model to `folder`, a shard in memory at a time.

    sizes: the bytes of each weight by its name, in order. weight: returns the weight of a name.
    Weights of an earlier call that are not among these files are removed.
    """
    groups = _groups(sizes)
    files = ["model.safetensors"]
    if len(groups) > 1:
        files = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    for file, names in zip(files, groups, strict=True):
        with replacing(folder / file) as scratch:
            weights = {name: jax.numpy.asarray(weight(name)) for name in names}
            try:
                save_file(weights, scratch, metadata={"format": "pt"})
            except SafetensorError as error:  # what it makes of a full disk
                raise OSError(errno.EIO, str(error)) from None
            scratch.chmod(0o644)  # safetensors makes it for the owner alone
    for stale in {path.name for path in folder.glob("model*.safetensors")} - set(files):
        (folder / stale).unlink()
    (folder / INDEX).unlink(missing_ok=True)
    if len(groups) > 1:
        places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(places.items())),
        }
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def are_whole(folder: pathlib.Path) -> bool:
    """Whether all files that `write` left in a folder are there."""
    if (folder / "model.safetensors").is_file():
        return True
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except OSError:
        return False
    return all((folder / file).is_file() for file in set(places.values()))


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names in order, in groups of at most SHARD_BYTES (or of one weight)."""
    groups: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(name)
        room -= size
    return groups
