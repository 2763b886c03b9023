"""Which model a folder holds: the hashes of its weights, tokenizer, chat template and settings.

The weights are hashed one by one, by their names: how they are spread over files is no difference.
That takes a part of the time of loading them.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable

from collab_jax.models import hf

TEMPLATE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"  # which may hold the template


def fingerprint(folder: pathlib.Path) -> dict[str, str]:
    """The SHA-256 of each part of a model folder: weights, tokenizer, chat_template, config.

    config is both config.json and generation_config.json. A file that is absent counts as such,
    but for the weights: FolderError is raised where there are none, or where they are damaged.
    """
    settings = json.loads((folder / SETTINGS).read_text()) if (folder / SETTINGS).is_file() else {}
    template = settings.pop("chat_template", None)
    if (folder / TEMPLATE).is_file():
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
    tokenizer = set(hf.TOKENIZER_FILES) - {TEMPLATE, SETTINGS, hf.GENERATION}
    return {
        "weights": _weights_digest(folder),
        "tokenizer": _digest(
            _files_digest(folder, tokenizer), json.dumps(settings, sort_keys=True)
        ),
        "chat_template": _digest(template if isinstance(template, str) else json.dumps(template)),
        "config": _files_digest(folder, {"config.json", hf.GENERATION}),
    }


def differences(then: dict[str, str], now: dict[str, str]) -> str:
    """How the parts of a fingerprint differ from those of an earlier one, or ""."""
    return ", ".join(
        f"{part} (SHA-256 {then.get(part, 'none')[:12]} then, {digest[:12]} now)"
        for part, digest in now.items()
        if then.get(part) != digest
    )


def _weights_digest(folder: pathlib.Path) -> str:
    """The SHA-256 of the weights with their names, types and shapes."""
    lines = []
    for _, name, value in hf.stored_weights(folder):
        digest = hashlib.sha256(value.tobytes()).hexdigest()
        lines.append(f"{name} {value.dtype} {value.shape} {digest}")
    return _digest(*sorted(lines))


def _files_digest(folder: pathlib.Path, names: Iterable[str]) -> str:
    """The SHA-256 of those of the files that are there, with their names."""
    lines = []
    for name in sorted(names):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                lines.append(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return _digest(*lines)


def _digest(*texts: str) -> str:
    """The SHA-256 of texts, each on its own."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
