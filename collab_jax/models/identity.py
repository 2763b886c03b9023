"""Which model a folder holds: the hashes of its weights, tokenizer, chat template and settings.

Files are hashed as they are, the weights too: that takes a part of the time of loading them.
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

    config is both config.json and generation_config.json. A file that is absent counts as such.
    """
    settings = json.loads((folder / SETTINGS).read_text()) if (folder / SETTINGS).is_file() else {}
    template = settings.pop("chat_template", None)
    if (folder / TEMPLATE).is_file():
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
    tokenizer = set(hf.TOKENIZER_FILES) - {TEMPLATE, SETTINGS, hf.GENERATION}
    return {
        "weights": _files_digest(folder, {file.name for file in folder.glob("*.safetensors")}),
        "tokenizer": _digest(
            _files_digest(folder, tokenizer), json.dumps(settings, sort_keys=True)
        ),
        "chat_template": _digest(template if isinstance(template, str) else json.dumps(template)),
        "config": _files_digest(folder, {"config.json", hf.GENERATION}),
    }


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
