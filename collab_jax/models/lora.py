"""Low-rank adapters (Hu et al. 2021, "LoRA").

The kernel W [in, out] of a projection acts as W + alpha / rank * A B. A [in, rank] and B [rank,
out] are leaves `lora_a` and `lora_b` beside `kernel`, so an adapter is a tree of the model's shape
that holds these leaves alone, and `join` of base and adapter is what the decoder computes with. A
training step differentiates by the adapter and joins inside; gradient, optimizer state, average and
checkpoint then have its leaves only.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from collab_jax.models import decoder
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.files import replacing, write_text


def _flat(params: Params) -> dict[tuple[str, ...], Any]:
    """Parameters by their path."""
    return traverse_util.flatten_dict(params)


def _kernels(cfg: DecoderConfig) -> dict[tuple[str, ...], tuple[int, int]]:
    """Shape [in, out] of each projection in a block, by path."""
    shapes = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))
    return {
        path[:-1]: leaf.shape
        for path, leaf in _flat(shapes).items()
        if path[-1] == "kernel" and len(path) > 2
    }


def configure(cfg: DecoderConfig, settings: ConfigDict) -> DecoderConfig:
    """`cfg` with the scale of the adapter that `config.lora` describes.

    Raises UserError where its targets or its rank do not go with the model.
    """
    if settings.rank == 0:
        return cfg
    kernels = _kernels(cfg)
    known = sorted({path[-1] for path in kernels})
    if unknown := [name for name in settings.targets if name not in known]:
        raise UserError(
            f"config.lora.targets names {unknown[0]!r}: this model has {', '.join(known)}"
        )
    if not settings.targets:
        raise UserError(
            f"config.lora.targets is empty: name some of {', '.join(known)}, "
            "or set config.lora.rank=0"
        )
    path, shape = min(
        ((p, s) for p, s in kernels.items() if p[-1] in settings.targets),
        key=lambda item: min(item[1]),
    )
    if not 1 <= settings.rank <= min(shape):
        raise UserError(
            f"config.lora.rank={settings.rank} must lie in 0 (off) to {min(shape)}, "
            f"the smaller side of {path[-1]} {list(shape)}, the smallest of the targets"
        )
    if not 0 < settings.alpha < float("inf"):
        raise UserError(f"config.lora.alpha={settings.alpha} must be finite and above 0")
    return dataclasses.replace(cfg, lora_scale=settings.alpha / settings.rank)


def init(cfg: DecoderConfig, settings: ConfigDict, key: jax.Array, dtype: str) -> Params:
    """An adapter that changes nothing yet: A is uniform, with variance 1 / (3 in), and B is zero.

    As PEFT begins.
    """
    flat = {}
    for path, (rows, columns) in _kernels(cfg).items():
        if path[-1] in settings.targets:
            key, own = jax.random.split(key)
            bound = rows**-0.5
            flat[*path, "lora_a"] = jax.random.uniform(
                own, (rows, settings.rank), dtype, -bound, bound
            )
            flat[*path, "lora_b"] = jax.numpy.zeros((settings.rank, columns), dtype)
    return traverse_util.unflatten_dict(flat)


def join(frozen: Params | None, trained: Params) -> Params:
    """The tree that the decoder computes with; nothing is copied. frozen None: all is trained."""
    if frozen is None:
        return trained
    return traverse_util.unflatten_dict(_flat(frozen) | _flat(trained))


def merge(base: Params, adapter: Params, scale: float) -> Params:
    """`base` with scale * A B added to its kernels, in their type; on the host."""
    flat, added = _flat(base), _flat(adapter)
    for path, a in added.items():
        if path[-1] == "lora_a":
            b = added[*path[:-1], "lora_b"]
            kernel = flat[*path[:-1], "kernel"]
            product = np.asarray(a, np.float32) @ np.asarray(b, np.float32)
            merged = np.asarray(kernel, np.float32) + scale * product
            flat[*path[:-1], "kernel"] = merged.astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat)


def save(
    folder: pathlib.Path,
    adapter: Params,
    settings: ConfigDict,
    base: str,
    revision: str | None = None,
) -> None:
    """Writes the adapter as PEFT reads it.

    base: the folder or hub name of the model it is for. revision: the commit of the hub's model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for (layer, *modules, leaf), value in _flat(adapter).items():
        matrix = {"lora_a": "lora_A", "lora_b": "lora_B"}[leaf]
        name = ".".join([layer.replace("_", "."), *modules, matrix])
        transposed = np.ascontiguousarray(np.asarray(value, np.float32).T)
        weights[f"base_model.model.model.{name}.weight"] = transposed
    with replacing(folder / "adapter_model.safetensors") as scratch:
        save_file(weights, scratch, metadata={"format": "pt"})
        scratch.chmod(0o644)  # safetensors makes it for the owner alone
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": sorted(settings.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
