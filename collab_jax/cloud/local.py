"""A cloud without network or key: a larger decoder in this process, from a Hugging Face folder."""

import functools
import hashlib
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from collab_jax.cloud.protocol import CloudError, Failure, Reply
from collab_jax.models import hf, sampler
from collab_jax.models.decision import NEVER, Marker
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.models.special_tokens import end_ids
from collab_jax.models.text import Messages

BLOCKS, BLOCK_BYTES = 64, 4096  # of each weights file, which tell models apart
BUCKET = 64  # prompts are padded to multiples of so many tokens, each of which compiles once


class Loaded(NamedTuple):
    """What it takes to sample from a model: `params` lie on the first device."""

    tokenizer: Any
    cfg: DecoderConfig
    params: Params
    settings: sampler.SamplerSettings


class Written(NamedTuple):
    """A response of the model."""

    text: str
    tokens: int
    ended: bool  # else it was cut off at max_tokens


@dataclass(frozen=True)
class LocalCloud:
    """The model of `folder`, loaded at the first call.

    A prompt's random numbers are its own, whatever it is batched with. It has no provider: the
    fingerprint of its weights, among the parameters, says who answers.
    """

    model: str
    folder: pathlib.Path
    sampling: dict  # temperature, max_tokens
    prompt_length: int  # tokens
    batch: int
    workers: int = 1
    provider: str = ""

    @property
    def parameters(self) -> dict:
        return {**self.sampling, "weights": self._fingerprint}

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.folder)

    def highest_usd(self, messages: Messages) -> float:
        return 0.0

    def answer(self, prompts: Sequence[Messages]) -> list[Reply | Failure]:
        start = time.monotonic()
        ids = [self._prompt_ids(messages) for messages in prompts]
        fitting = [i for i, row in enumerate(ids) if len(row) <= self.prompt_length]
        too_long = Failure(f"longer than config.cloud.prompt_length={self.prompt_length}")
        outcomes: list[Reply | Failure] = [too_long] * len(ids)
        if fitting:
            written = self._sample([prompts[i] for i in fitting], [ids[i] for i in fitting])
            seconds = (time.monotonic() - start) / len(fitting)
            for i, response in zip(fitting, written, strict=True):
                reasoning, answer = split_reasoning(response.text)
                outcomes[i] = Reply(
                    text=answer,
                    input_tokens=len(ids[i]),
                    output_tokens=response.tokens,
                    seconds=seconds,
                    usd=0.0,
                    reasoning=reasoning,
                    finish_reason="stop" if response.ended else "length",
                )
        return outcomes

    def _prompt_ids(self, messages: Messages) -> list[int]:
        return self._loaded.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, tokenize=True
        )

    @functools.cached_property
    def _loaded(self) -> Loaded:
        """The model, read when it is first needed."""
        from transformers import AutoTokenizer

        described = hf.read_config(self.folder)
        dtype = described.get("dtype") or described.get("torch_dtype") or "float32"
        cfg = hf.config_from_hf(described, dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, use_fast=True)
        except Exception as error:  # transformers raises many kinds for a damaged tokenizer
            raise CloudError(
                f"no usable tokenizer in {self.folder} ({type(error).__name__}): fetch it again"
            ) from None
        if not tokenizer.chat_template or tokenizer.eos_token_id is None:
            raise CloudError(
                f"the tokenizer in {self.folder} has no chat template or no end of text: use an "
                "instruct model"
            )
        pad_id = tokenizer.pad_token_id
        settings = sampler.SamplerSettings(
            group=1,
            max_new=self.sampling["max_tokens"],
            temperature=self.sampling["temperature"],
            top_p=1.0,
            eos_ids=end_ids(tokenizer, self.folder),
            pad_id=tokenizer.eos_token_id if pad_id is None else pad_id,
            # A token that does not exist: a cloud has nobody to call.
            marker=Marker(-1, NEVER),
            segments=2,
            slot_counts=3,
            cache_dtype=dtype,
        )
        params = jax.device_put(hf.load(self.folder, cfg, dtype), jax.local_devices()[0])
        return Loaded(tokenizer, cfg, params, settings)

    def _sample(self, prompts: Sequence[Messages], ids: list[list[int]]) -> list[Written]:
        """Returns a response to each of at most `batch` prompts, given as text and as tokens."""
        tokenizer, cfg, params, settings = self._loaded
        length = -(-max(map(len, ids)) // BUCKET) * BUCKET
        tokens = np.full((self.batch, length), settings.pad_id, np.int32)
        mask = np.zeros((self.batch, length), bool)
        mask[:, -1] = True  # rows that fill the batch up have one token
        for i, row in enumerate(ids):
            tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
        filled_up = [repr(messages).encode() for messages in prompts] + [None] * self.batch
        seeds = [
            0 if text is None else int.from_bytes(hashlib.blake2b(text, digest_size=4).digest())
            for text in filled_up[: self.batch]
        ]
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed))(
            jnp.array(seeds, jnp.uint32)
        )
        # No collective is in these programs, so they may run beside those of training.
        samples = sampler.sample(
            params, cfg, jnp.asarray(tokens), jnp.asarray(mask), keys, -np.inf, settings=settings
        )
        count = len(ids)
        rows, real = np.asarray(samples.tokens)[:count, 0], np.asarray(samples.mask)[:count, 0]
        ended = np.asarray(samples.ended)[:count, 0]
        written = [
            [token for token in row[m].tolist() if token not in settings.eos_ids]
            for row, m in zip(rows, real, strict=True)
        ]
        return [
            Written(text, n, end)
            for text, n, end in zip(
                tokenizer.batch_decode(written), real.sum(1).tolist(), ended.tolist(), strict=True
            )
        ]


def fingerprint(folder: pathlib.Path) -> str:
    """Returns 16 hex digits that tell this model from another.

    They are made from its config and some blocks of each file of weights.
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


def split_reasoning(text: str) -> tuple[str, str]:
    """Returns (reasoning, answer) of a response that may begin with `<think> ... </think>`.

    The opening tag may be the template's.
    """
    reasoning, closed, answer = text.partition("</think>")
    if not closed:
        return "", text.strip()
    return reasoning.strip().removeprefix("<think>").strip(), answer.strip()


def from_config(config: ConfigDict, task: Any) -> LocalCloud:
    """Returns the local cloud of `config`, which is the part `cloud`.

    Raises UserError where the folder cannot be used.
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
        model=config.model,
        folder=hf.locate(config.model),
        sampling=sampling,
        prompt_length=config.prompt_length,
        batch=config.batch_size,
    )
