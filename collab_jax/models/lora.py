"""Low-rank adapters (Hu et al. 2021, "LoRA").

The kernel W [in, out] of a projection acts as W + alpha / rank * A B. A [in, rank] and B [rank,
out] are leaves `lora_a` and `lora_b` beside `kernel`, with an axis of layers in front as it has. So
an adapter is a tree of the model's shape that holds these leaves alone, and `join` of base and
adapter is what the decoder computes with. A training step differentiates by the adapter and joins
inside; gradient, optimizer state, average and checkpoint then have its leaves only.

The decision token's embedding is trained too, as the leaf `lora_row` [E] that is added to it (and,
where the head has weights of its own, another that is added to the token's there). It has to be:
tokens that no text has are often alike to the bit, as SmolLM2's and Llama's reserved ones, and no
adapter of other weights could then give one of them a logit above its twins'.
"""

import dataclasses
import json
import pathlib
from typing import Any, cast

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from collab_jax.models import decoder, hf
from collab_jax.models.blocks import LAYERS, empty, unstacked
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.files import replacing, write_text

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT names them
TOKENS = "trainable_token_indices"  # an entry of its config


def _flat(params: Params) -> dict[tuple[str, ...], Any]:
    """Parameters by their path."""
    return traverse_util.flatten_dict(params)


def _kernels(cfg: DecoderConfig) -> dict[tuple[str, ...], tuple[int, int]]:
    """Shape [in, out] of each projection in a block, by path."""
    shapes = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))
    return {
        path[:-1]: leaf.shape[1:]
        for path, leaf in _flat(shapes).items()
        if path[-1] == "kernel" and path[0] == LAYERS
    }


def configure(cfg: DecoderConfig, settings: ConfigDict, decision_id: int | None) -> DecoderConfig:
    """`cfg` with the scale of the adapter that `config.lora` describes and the token it moves.

    decision_id: the decision token's id; None where plain text decides, or nobody knows it.
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
    return dataclasses.replace(
        cfg, lora_scale=settings.alpha / settings.rank, lora_token=decision_id
    )


def init(cfg: DecoderConfig, settings: ConfigDict, key: jax.Array, dtype: str) -> Params:
    """An adapter that changes nothing yet: A is uniform, with variance 1 / (3 in), and B is zero.

    As PEFT begins.
    """
    flat = {}
    n, rank = cfg.num_layers, settings.rank
    for path, (rows, columns) in _kernels(cfg).items():
        if path[-1] in settings.targets:
            key, own = jax.random.split(key)
            bound = rows**-0.5
            flat[*path, "lora_a"] = jax.random.uniform(own, (n, rows, rank), dtype, -bound, bound)
            flat[*path, "lora_b"] = jax.numpy.zeros((n, rank, columns), dtype)
    for module in _embeddings(cfg):
        flat[module, "lora_row"] = jax.numpy.zeros(cfg.hidden_size, dtype)
    return traverse_util.unflatten_dict(flat)


def _embeddings(cfg: DecoderConfig) -> tuple[str, ...]:
    """The modules in which an adapter moves a token; none where it moves no token."""
    if cfg.lora_token is None:
        return ()
    return ("embed_tokens",) if cfg.tied else ("embed_tokens", "lm_head")


def _moved_tokens(cfg: DecoderConfig) -> dict[str, list[int]]:
    """The tokens that an adapter moves, by module, as PEFT has them."""
    return {module: [cast(int, cfg.lora_token)] for module in _embeddings(cfg)}


def _token_row(base: Params, module: str, token: int) -> np.ndarray:
    """What a model has for a token in a module of `_embeddings`, f32[E]."""
    if module == "lm_head":
        return np.asarray(base[module]["kernel"][:, token], np.float32)
    return np.asarray(base[module]["embedding"][token], np.float32)


def start(cfg: DecoderConfig, base: Params, settings: ConfigDict, seed: int, dtype: str) -> Params:
    """The adapter of `base` that training begins with: that of `settings.start`, or a new one."""
    if settings.start:
        return load(settings.start, cfg, base, settings, dtype)
    return init(cfg, settings, jax.random.key(seed), dtype)


def join(frozen: Params | None, trained: Params) -> Params:
    """The tree that the decoder computes with; nothing is copied. frozen None: all is trained."""
    if frozen is None:
        return trained
    return traverse_util.unflatten_dict(_flat(frozen) | _flat(trained))


def merge(base: Params, adapter: Params, cfg: DecoderConfig) -> Params:
    """`base` with what the adapter adds to its weights, in their type; on the host."""
    wide = lambda x: np.asarray(x, np.float32)  # noqa: E731
    flat, added = _flat(base), _flat(adapter)
    for path, a in added.items():
        if path[-1] == "lora_a":
            b, kernel = added[*path[:-1], "lora_b"], flat[*path[:-1], "kernel"]
            merged = np.array(kernel)
            for i, (layer_a, layer_b) in enumerate(zip(wide(a), wide(b), strict=True)):
                merged[i] = wide(merged[i]) + cfg.lora_scale * (layer_a @ layer_b)
            flat[*path[:-1], "kernel"] = merged
        elif path[-1] == "lora_row":
            leaf = "kernel" if path[0] == "lm_head" else "embedding"
            weights = np.array(flat[path[0], leaf])
            row = _token_row(base, path[0], cast(int, cfg.lora_token)) + wide(a)
            weights[(slice(None), cfg.lora_token) if leaf == "kernel" else cfg.lora_token] = row
            flat[path[0], leaf] = weights
    return traverse_util.unflatten_dict(flat)


def folder_of(path: str) -> pathlib.Path:
    """The folder of an adapter, `path` itself or that of a bundled one of this name.

    Raises UserError where it is neither.
    """
    places = (pathlib.Path(path).expanduser(), hf.ASSETS / path)
    folder = next((place for place in places if (place / CONFIG).is_file()), None)
    if folder is None:
        raise UserError(f"config.lora.start={path!r} has no {CONFIG}: name an adapter's folder")
    return folder


def load(path: str, cfg: DecoderConfig, base: Params, settings: ConfigDict, dtype: str) -> Params:
    """The adapter of `base` in a folder that `save` or PEFT wrote, as `dtype`, on the host.

    path: the folder, or the name of an adapter that is bundled with the package. Raises UserError
    where its rank, scale or weights are not those of `settings` and `cfg`.
    """
    folder = folder_of(path)
    try:
        said = json.loads((folder / CONFIG).read_text())
        weights = {
            name: np.asarray(x, np.float32) for name, x in load_file(folder / WEIGHTS).items()
        }
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read the adapter in {folder} ({error}): fetch it again") from None
    for key in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern"):
        if said.get(key):
            raise UserError(
                f"the adapter in {folder} has {key}, which is not known here: merge it into its "
                "model with PEFT, and start from that"
            )
    tokens = _moved_tokens(cfg)
    if said.get(TOKENS) and said[TOKENS] != tokens:
        raise UserError(
            f"the adapter in {folder} moves the tokens {said.get(TOKENS)}, but "
            f"the decision token is {tokens}: set config.text.decision_token to its own"
        )
    for key, name in (("r", "rank"), ("lora_alpha", "alpha")):
        if said.get(key) != settings[name]:
            raise UserError(
                f"the adapter in {folder} has {name} {said.get(key)}: "
                f"set config.lora.{name} to it (now {settings[name]})"
            )
    like = jax.eval_shape(lambda: init(cfg, settings, jax.random.key(0), dtype))
    adapter = empty(like, dtype)
    places = {_peft_name(path): (path[0], leaf) for path, leaf in unstacked(adapter).items()}
    for module in tokens if not said.get(TOKENS) else ():  # it moves no token yet
        row = _token_row(base, module, tokens[module][0])
        weights[_peft_name((module, "lora_row"))] = row[None]
    if differing := sorted(places.keys() ^ weights.keys()):
        raise UserError(
            f"the adapter in {folder} {'lacks' if differing[0] in places else 'has'} "
            f"{differing[0]!r}: set config.lora.targets to its target_modules, "
            f"{said.get('target_modules')}, and model.path to its model"
        )
    for name, (module, place) in places.items():
        value, shape = weights[name], place.shape[::-1]
        if module != LAYERS and value.shape == (1, *shape):
            value = value[0] - _token_row(base, module, cast(int, cfg.lora_token))
        if value.shape != shape:
            raise UserError(
                f"the adapter in {folder}: {name!r} has shape {value.shape}, where this "
                f"model has {shape}: is config.model.path its model?"
            )
        place[...] = value.T
    return adapter


def _peft_name(path: tuple[str, ...]) -> str:
    """The name of a leaf in PEFT's file."""
    if path[-1] == "lora_row":
        module = path[0] if path[0] == "lm_head" else f"model.{path[0]}"
        return f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
    *modules, leaf = path
    name = ".".join([*modules, {"lora_a": "lora_A", "lora_b": "lora_B"}[leaf]])
    return f"base_model.model.model.{name}.weight"


def save(
    folder: pathlib.Path,
    adapter: Params,
    cfg: DecoderConfig,
    base: Params,
    settings: ConfigDict,
    *,
    name: str,
    revision: str | None = None,
) -> None:
    """Writes the adapter of `base` as PEFT reads it.

    Its matrices have the type of the computation, in which the model reads them anyway; a moved
    token's row is in f32, since it is the difference to the model's own row that counts.
    name: the folder or hub name of the model it is for. revision: the commit of the hub's model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for path, value in unstacked(adapter).items():
        if path[-1] == "lora_row":  # PEFT has the whole row, not what is added
            row = _token_row(base, path[0], cast(int, cfg.lora_token))
            weights[_peft_name(path)] = (row + value.astype(np.float32))[None]
        else:
            weights[_peft_name(path)] = np.ascontiguousarray(value.astype(cfg.dtype).T)
    with replacing(folder / WEIGHTS) as scratch:
        save_file(jax.tree.map(jax.numpy.asarray, weights), scratch, metadata={"format": "pt"})
        scratch.chmod(0o644)  # safetensors makes it for the owner alone
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": sorted(settings.targets),
        TOKENS: _moved_tokens(cfg) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
