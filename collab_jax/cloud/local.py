"""A cloud without network or key: a larger decoder from any Hugging Face folder, in this process,
with our sampler.
"""

import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.cloud.protocol import CloudError, Failure, Messages, Reply
from collab_jax.models import hf, sampler
from collab_jax.models.decision import Marker

BLOCKS, BLOCK_BYTES = 64, 4096  # of each weights file, which tell models apart
BUCKET = 64  # prompts are padded to multiples of so many tokens, each of which compiles once


@dataclass(frozen=True)
class LocalCloud:
    """The model of `folder`, loaded at the first call. A prompt's random numbers are its own,
    whatever it is batched with.
    """

    model: str
    folder: pathlib.Path
    sampling: dict  # temperature, max_tokens
    prompt_length: int  # tokens
    batch: int
    workers: int = 1

    @functools.cached_property
    def parameters(self) -> dict:
        return {**self.sampling, "weights": fingerprint(self.folder)}

    def highest_usd(self, messages: Messages) -> float:
        return 0.0

    def answer(self, prompts: Sequence[Messages]) -> list[Reply | Failure]:
        start = time.monotonic()
        tokenizer, _, _, _ = self._parts
        chat = functools.partial(
            tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=False
        )
        ids = [chat(messages, tokenize=True) for messages in prompts]
        fitting = [i for i, row in enumerate(ids) if len(row) <= self.prompt_length]
        found: list[Reply | Failure] = [
            Failure(f"longer than config.cloud.prompt_length={self.prompt_length}")
        ] * len(ids)
        if fitting:
            texts, counts, ended = self._sample(
                [prompts[i] for i in fitting], [ids[i] for i in fitting]
            )
            seconds = (time.monotonic() - start) / len(fitting)
            for i, text, count, end in zip(fitting, texts, counts, ended, strict=True):
                reasoning, answer = split_reasoning(text)
                found[i] = Reply(
                    answer, len(ids[i]), count, seconds, 0.0, reasoning, "stop" if end else "length"
                )
        return found

    @functools.cached_property
    def _parts(self):
        """(tokenizer, decoder's config, parameters on the first device, sampler's settings)."""
        from transformers import AutoTokenizer

        described = hf.read_config(self.folder)
        dtype = described.get("dtype") or described.get("torch_dtype") or "float32"
        cfg = hf.config_from_hf(described, dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, use_fast=True)
        except (
            Exception
        ) as error:  # transformers raises many kinds for a damaged or missing tokenizer
            raise CloudError(
                f"no usable tokenizer in {self.folder} ({type(error).__name__}): fetch it again"
            ) from None
        if not tokenizer.chat_template or tokenizer.eos_token_id is None:
            raise CloudError(
                f"the tokenizer in {self.folder} has no chat template or no end of text: use an instruct model"
            )
        params = jax.device_put(hf.load(self.folder, cfg, dtype), jax.local_devices()[0])
        settings = sampler.SamplerSettings(
            group=1,
            max_new=self.sampling["max_tokens"],
            temperature=self.sampling["temperature"],
            top_p=1.0,
            eos_ids=end_ids(self.folder, tokenizer.eos_token_id),
            pad_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            marker=Marker(
                -1, ((-2,),)
            ),  # tokens that do not exist: a cloud has nobody to call
            segments=2,
            slot_counts=3,
            cache_dtype=dtype,
        )
        return tokenizer, cfg, params, settings

    def _sample(
        self, prompts: Sequence[Messages], ids: list[list[int]]
    ) -> tuple[list[str], list[int], list[bool]]:
        """Texts, their tokens, and whether they ended, of prompts given as messages and as tokens."""
        tokenizer, cfg, params, settings = self._parts
        length = -(-max(map(len, ids)) // BUCKET) * BUCKET
        tokens = np.full((self.batch, length), settings.pad_id, np.int32)
        mask = np.zeros((self.batch, length), bool)
        mask[:, -1] = True  # rows that fill the batch up have one token
        for i, row in enumerate(ids):
            tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
        digests = [hashlib.blake2b(repr(p).encode(), digest_size=4).digest() for p in prompts] + [
            b""
        ] * self.batch
        seeds = jnp.array([int.from_bytes(d, "big") for d in digests[: self.batch]], jnp.uint32)
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed))(seeds)
        # No collective is in these programs, so they may run beside those of training.
        got = sampler.sample(params, cfg, tokens, mask, keys, -np.inf, settings=settings)
        rows, real, ended = (
            np.asarray(x)[: len(ids), 0] for x in (got.tokens, got.mask, got.ended)
        )
        kept = [
            [t for t in row[m].tolist() if t not in settings.eos_ids]
            for row, m in zip(rows, real, strict=True)
        ]
        return tokenizer.batch_decode(kept), real.sum(1).tolist(), ended.tolist()


def fingerprint(folder: pathlib.Path) -> str:
    """16 hex digits that tell this model from another, from its config and some blocks of each file
    of weights.
    """
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=8)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(BLOCKS):
                file.seek(size * i // BLOCKS)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def end_ids(folder: pathlib.Path, eos_id: int) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's, and those of generation_config.json."""
    path = folder / "generation_config.json"
    listed = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    return tuple(
        dict.fromkeys(
            [eos_id, *(listed if isinstance(listed, list) else [listed] * (listed is not None))]
        )
    )


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a response that may begin with `<think> ... </think>`; the opening may
    be the template's.
    """
    reasoning, closed, answer = text.partition("</think>")
    return (
        (reasoning.strip().removeprefix("<think>").strip(), answer.strip())
        if closed
        else ("", text.strip())
    )


def from_config(config, task) -> LocalCloud:
    """Builds the local cloud of `config` (the `cloud` part). Raises UserError where the folder
    cannot be used.
    """
    sampling = {
        "temperature": float(config.parameters.temperature),
        "max_tokens": int(config.parameters.max_tokens),
    }
    if sampling["temperature"] < 0 or sampling["max_tokens"] < 1:
        raise CloudError(
            "config.cloud.parameters: temperature must be at least 0, max_tokens at least 1"
        )
    return LocalCloud(
        config.model, hf.locate(config.model), sampling, config.prompt_length, config.batch_size
    )
