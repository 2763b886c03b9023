"""Hugging Face folders: config.json and safetensors in, the same out, by one rename rule.

`load` is strict: a weight that is unknown, missing, doubled or of another shape is an error that
names it.
"""

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from collab_jax.models import decoder, gguf, published, shards
from collab_jax.models.blocks import empty, unstacked
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.models.decoder_config import RopeScaling
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.files import write_text

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    GENERATION,
)
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)
# A repository of the hub, and after the @ the branch, tag or commit to take of it.
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


class FolderError(UserError):
    """A model folder that cannot be used; the message says what to do."""


def locate(
    path: str, files: Sequence[str] = ("*.json", "*.safetensors", "*.txt", "*.jinja")
) -> pathlib.Path:
    """The folder of the model at `path`, which has these `files`.

    path: a local folder, a .gguf file, the name of a model that is bundled with the package or
    comes in another one (`published.PACKAGES`), or a hub repository (`org/name`, or
    `org/name@revision`), of which a snapshot is downloaded. A GGUF file is converted into a folder
    in the user's cache. Raises UserError where there is no such model.
    """
    local = pathlib.Path(path).expanduser()
    for folder in (local, ASSETS / path):
        if (folder / "config.json").is_file():
            return folder
    if file := gguf_file(path):
        return gguf.convert(file)
    if local.exists():
        raise FolderError(
            f"{path!r} has no config.json: it is neither a Hugging Face model folder nor a .gguf"
        )
    if not HUB_NAME.fullmatch(path):
        if (ASSETS / path / "adapter_config.json").is_file():
            raise FolderError(
                f"{path!r} is an adapter and no model: name it in config.lora.start, with its "
                "config"
            )
        known = sorted(
            {p.parent.name for p in ASSETS.glob("*/config.json")} | {*published.PACKAGES}
        )
        raise FolderError(
            f"no model at {path!r}: give a folder with config.json, a .gguf file, a hub name, "
            f"or one of {known}"
        )
    return _download(path, files)


def gguf_file(path: str) -> pathlib.Path | None:
    """The GGUF file that `path` names, itself or as the model in a package; None where it does not.

    Raises UserError where that package is not installed.
    """
    if path in published.PACKAGES:
        return published.packaged_file(path)
    file = pathlib.Path(path).expanduser()
    return file if file.suffix == ".gguf" else None


def _download(path: str, files: Sequence[str]) -> pathlib.Path:
    """The snapshot of a hub repository, `org/name` or `org/name@revision`."""
    import huggingface_hub
    from huggingface_hub import errors

    name, revision = split_revision(path)
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files))
        )
    except errors.GatedRepoError:
        raise FolderError(
            f"{name!r} is gated: accept its licence at https://huggingface.co/{name} "
            "and set HF_TOKEN, or give a local folder"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FolderError(
            f"the hub has no {name!r}, or it is private: "
            "check the spelling, set HF_TOKEN, or give a local folder"
        ) from None
    except errors.RevisionNotFoundError:
        raise FolderError(
            f"{name!r} has no revision {revision!r}: give a branch, a tag or a whole commit"
        ) from None
    except Exception as error:  # the hub's errors are many; each is the user's to mend
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FolderError(
            f"cannot download {path!r} ({reason}): "
            "check the name and access, or give a local folder"
        ) from None


def split_revision(path: str) -> tuple[str, str | None]:
    """(name, revision) of a hub name; any other path has no revision."""
    match = HUB_NAME.fullmatch(path)
    return (match[1], match[2]) if match else (path, None)


def commit(folder: pathlib.Path) -> str | None:
    """The commit that a snapshot of the hub is of; None for any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder.name if is_snapshot else None


def architecture(path: str) -> dict:
    """The contents of config.json of the model at `path`, for which no weights are downloaded.

    For the models of `published.py` nothing is.
    """
    name, _ = split_revision(path)
    if name in published.CONFIGS and not pathlib.Path(path).exists():
        return published.CONFIGS[name]
    return read_config(locate(path, ["config.json"]))


def _require(section: dict, names: Iterable[str]) -> None:
    if missing := [name for name in names if section.get(name) is None]:
        raise FolderError(f"config.json lacks {', '.join(missing)}")


def config_from_hf(hf: dict, dtype: str = "float32", remat: bool = False) -> DecoderConfig:
    """DecoderConfig from the contents of config.json; refuses what the decoder does not compute."""
    kind = hf.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise FolderError(
            f"model_type {kind!r} is not supported: use a Llama, Qwen2.5 or Qwen3 checkpoint"
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise FolderError(f"hidden_act {hf['hidden_act']!r} is not supported: only 'silu' is")
    if hf.get("use_sliding_window"):
        raise FolderError("use_sliding_window is not supported: set it to false in config.json")
    _require(hf, REQUIRED)
    theta, scaling = _rope(hf)
    # Qwen2.5 has biases on q, k and v always; Llama and Qwen3, where they are set, on o too.
    bias = bool(hf.get("attention_bias", False))
    heads = hf["num_attention_heads"]
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rope_theta=theta,
        norm_eps=float(hf["rms_norm_eps"]),
        tied=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bias,
        output_bias=kind != "qwen2" and bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        rope_scaling=scaling,
        initializer_range=float(hf.get("initializer_range", 0.02)),
        remat=remat,
        dtype=dtype,
    )


def _rope(hf: dict) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of the rotary embedding.

    transformers 5 moved rope_theta and rope_scaling into rope_parameters; older files have them at
    the top.
    """
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise FolderError(
            f"rope type {rope_type!r} is not supported: only 'default' and 'llama3' are"
        )
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    if theta is None:
        raise FolderError("config.json names no rope_theta")
    if rope_type == "default":
        return float(theta), None
    names = [f.name for f in dataclasses.fields(RopeScaling)]
    _require(rope, names)
    return float(theta), RopeScaling(**{name: rope[name] for name in names})


def weight_name(path: tuple[str, ...]) -> str:
    """('layers', '3', 'mlp', 'up_proj', 'kernel') -> 'model.layers.3.mlp.up_proj.weight'."""
    *modules, leaf = path
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}[leaf]
    name = ".".join([*modules, leaf])
    return name if name.startswith("lm_head") else f"model.{name}"


def out_in(path: tuple[str, ...], leaf: np.ndarray) -> np.ndarray:
    """A leaf of `unstacked` parameters as a folder has it: kernels are [out, in]. A view."""
    return leaf.T if path[-1] == "kernel" else leaf


def read_config(folder: pathlib.Path) -> dict:
    """The contents of config.json."""
    try:
        contents = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise FolderError(f"cannot read {folder / 'config.json'}: {error}") from None
    if not isinstance(contents, dict):
        raise FolderError(
            f"{folder / 'config.json'} is not an object with settings: fetch it again"
        )
    return contents


class StoredWeight(NamedTuple):
    """A weight of a model folder, [out, in], and the file that it stands in."""

    file: pathlib.Path
    name: str
    value: np.ndarray


def stored_weights(folder: pathlib.Path) -> Iterator[StoredWeight]:
    """The weights of a folder, one in memory at a time. Raises FolderError for a damaged file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FolderError(f"{folder} holds no .safetensors file")
    for file in files:
        try:
            with safe_open(file, framework="flax") as stored:
                for name in stored.keys():  # noqa: SIM118 (safe_open is no mapping)
                    yield StoredWeight(file, name, np.asarray(stored.get_tensor(name)))
        except (SafetensorError, OSError) as error:
            raise FolderError(
                f"cannot read {file} ({error}): it may be cut short; fetch it again"
            ) from None


def load(folder: pathlib.Path, cfg: DecoderConfig, param_dtype: str) -> Params:
    """The folder's parameters as `param_dtype`, on the host.

    Raises FolderError where they are not exactly those of `cfg`.
    """
    shapes = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))
    params = empty(shapes, param_dtype)
    places = {weight_name(path): out_in(path, leaf) for path, leaf in unstacked(params).items()}
    found: set[str] = set()
    for file, name, value in stored_weights(folder):
        if name == "lm_head.weight" and cfg.tied:
            continue  # some exporters write the tied head twice
        if name not in places:
            raise FolderError(f"{file}: unknown weight {name!r}")
        if name in found:
            raise FolderError(f"{file}: weight {name!r} stands in two files")
        if value.shape != places[name].shape:
            raise FolderError(
                f"{file}: weight {name!r} has shape {value.shape}, "
                f"config.json says {places[name].shape}"
            )
        places[name][...] = value
        found.add(name)
    if missing := sorted(places.keys() - found):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FolderError(f"{folder}: missing weight {missing[0]!r}{others}")
    return params


def save(
    folder: pathlib.Path, params: Params, hf_config: dict, dtype: str, tokenizer: pathlib.Path
) -> None:
    """Writes a model folder: config.json, the weights and the tokenizer files of `tokenizer`.

    The weights are one safetensors file, or shards with an index; the kernels are transposed to
    Hugging Face's [out, in], a shard at a time. Each file is written beside its place and moved
    there, and weights of an earlier export that are not among these files are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {weight_name(path): out_in(path, leaf) for path, leaf in unstacked(params).items()}

    def weight(name: str) -> jax.Array:
        return jax.numpy.asarray(np.ascontiguousarray(weights[name]), dtype)

    itemsize = jax.numpy.dtype(dtype).itemsize
    shards.write(folder, {name: value.size * itemsize for name, value in weights.items()}, weight)
    config = {**hf_config, "dtype": dtype}
    config.pop("torch_dtype", None)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    copy_tokenizer(tokenizer, folder)


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies the TOKENIZER_FILES that `source` has."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and (source / name).resolve() != (folder / name).resolve():
            shutil.copyfile(source / name, folder / name)


def save_generation_config(folder: pathlib.Path, eos_ids: Sequence[int], pad_id: int) -> None:
    """Writes generation_config.json, which names every token that ends a response.

    Without it servers run on to their limit. One that is there keeps what else it says.
    """
    file = folder / GENERATION
    said = json.loads(file.read_text()) if file.is_file() else {"do_sample": False}
    generation = said | {"eos_token_id": list(eos_ids), "pad_token_id": pad_id}
    write_text(folder / GENERATION, json.dumps(generation, indent=2) + "\n")
