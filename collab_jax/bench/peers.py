"""The same work through PyTorch on the CPU, so that a bench can print ratios.

`generate` is transformers' sampling, `update` a policy-gradient update as torch programs write it,
`trl_step` one step of TRL's GRPOTrainer. Each prepares the work, which is not timed, and returns a
function that does it once. PyTorch is no dependency: without it this module can be imported, and
`versions` says what is installed.

Axis letters as in gapg.py: P prompts, G responses of a group, B = P * G rows, L prompt columns, T
response columns.
"""

import importlib.metadata
import pathlib
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from collab_jax.models.text import Text
from collab_jax.rl import rollout
from collab_jax.tasks import Example, Task

PACKAGES = ("torch", "transformers", "trl")


def versions() -> dict[str, str]:
    """Returns the version by name of those of PACKAGES that are installed."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _load(folder: pathlib.Path, dtype: str) -> Any:
    """Returns the folder's model as a torch module with weights of `dtype`, in eval mode."""
    import torch  # pyright: ignore[reportMissingImports] (an extra)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


# --------------------------------------------------------------------------------------- sampling


def generate(
    folder: pathlib.Path,
    prompts: np.ndarray,
    prompt_mask: np.ndarray,
    *,
    group: int,
    max_new: int,
    dtype: str,
    eos_ids: Sequence[int],
    seed: int = 0,
) -> Callable[[], int]:
    """Returns run(), which samples `group` responses to each prompt, all B rows at once.

    It samples at temperature 1, with a KV cache, and returns the number of tokens up to and with
    the first EOS of each row. prompts i32[P, L] padded on the left, prompt_mask bool[P, L].
    eos_ids: what ends a row; (): every row takes `max_new` tokens.
    """
    import torch  # pyright: ignore[reportMissingImports] (an extra)
    from transformers import GenerationConfig

    model = _load(folder, dtype)
    pad_id = model.config.pad_token_id
    # It is put on the model, since `generate` takes what a config leaves out (here: EOS) from the
    # model's own config.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=max_new,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=0 if pad_id is None else pad_id,
    )
    ids = torch.tensor(prompts, dtype=torch.long).repeat_interleave(group, 0)
    real = torch.tensor(prompt_mask, dtype=torch.long).repeat_interleave(group, 0)
    ends = torch.tensor(eos_ids, dtype=torch.long)
    torch.manual_seed(seed)

    def run() -> int:
        with torch.inference_mode():
            new = model.generate(input_ids=ids, attention_mask=real)[:, ids.shape[1] :]
            ended = torch.isin(new, ends).int()
            return int((ended.cumsum(1) - ended == 0).sum())  # no EOS before it

    return run


# ----------------------------------------------------------------------------------------- update


def update(
    folder: pathlib.Path,
    prompts: np.ndarray,
    prompt_mask: np.ndarray,
    tokens: np.ndarray,
    mask: np.ndarray,
    advantages: np.ndarray,
    *,
    micro_rows: int,
    learning_rate: float,
    dtype: str,
) -> Callable[[], float]:
    """Returns run(), which does one update on all B responses and returns its loss.

    A backward pass has `micro_rows` responses. prompts i32[P, L] padded on the left, prompt_mask
    bool[P, L]; tokens i32[P, G, T] padded on the right, mask bool[P, G, T] (EOS in); advantages
    f32[P, G]. The loss is gapg.loss divided by P; gradients are clipped to norm 1; AdamW.
    """
    import torch  # pyright: ignore[reportMissingImports] (an extra)

    P, G, T = tokens.shape
    model = _load(folder, dtype).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True
    )
    rows = lambda x, *shape: torch.tensor(x).reshape(P * G, *shape)  # noqa: E731
    targets, weight, A = rows(tokens, T).long(), rows(mask, T), rows(advantages)
    each = lambda x: torch.tensor(x).repeat_interleave(G, 0)  # noqa: E731
    ids = torch.cat([each(prompts).long(), targets[:, :-1]], 1)  # the last token is only predicted
    real = torch.cat([each(prompt_mask), weight[:, :-1]], 1).long()

    def loss_of(part: slice):
        logits = model(
            input_ids=ids[part], attention_mask=real[part], use_cache=False, logits_to_keep=T
        ).logits
        logp = logits.float().log_softmax(-1).gather(-1, targets[part, :, None])[..., 0]
        return -(A[part] * (logp * weight[part]).sum(1)).sum() / (P * G)

    def run() -> float:
        total = 0.0
        for start in range(0, P * G, micro_rows):
            loss = loss_of(slice(start, start + micro_rows))
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return run


# -------------------------------------------------------------------------------------------- TRL


class HeldTrainer:
    """A trainer in a thread of its own, which waits before each step until it is called.

    A call lets one step pass and returns `tokens`, the completion tokens of the latest step; the
    reward function sets them. The trainer's thread calls `hold` where a step begins and `passed`
    where it ends. A call raises what the trainer raises.
    """

    def __init__(self):
        self.tokens = 0
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._closed = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, train: Callable[[], object]) -> None:
        """Starts `train` in the thread; it runs up to its first step."""
        self._thread = threading.Thread(target=self._run, args=(train,), daemon=True)
        self._thread.start()

    def _run(self, train: Callable[[], object]) -> None:
        try:
            train()
            self._error = RuntimeError(
                "the trainer came to its end: give it more examples than a step takes"
            )
        except BaseException as error:
            self._error = error
        self._done.release()

    def hold(self) -> None:
        """Waits for the next call. Raises RuntimeError once the trainer is closed."""
        self._go.acquire()
        if self._closed:
            raise RuntimeError("the trainer is closed")

    def passed(self) -> None:
        """Ends the call that let this step pass."""
        self._done.release()

    def __call__(self) -> int:
        if self._error is None:
            self._go.release()
            self._done.acquire()
        if self._error is not None:
            raise self._error
        return self.tokens

    def close(self) -> None:
        """Ends the trainer without another step."""
        self._closed = True
        self._go.release()
        if self._thread is not None:
            self._thread.join()


def _prompt_string(tokenizer: Any, ids: list[int]) -> str:
    """Returns a string that `tokenizer(string)` turns into just `ids`.

    Raises ValueError where decoding gives none.
    """
    for first in (0, 1):  # 1: the tokenizer itself puts the first token, its BOS, before a string
        written = tokenizer.decode(
            ids[first:], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if tokenizer(written)["input_ids"] == ids:
            return written
    raise ValueError(f"no string has the tokens of the prompt {tokenizer.decode(ids)!r}")


def rewards(
    task: Task,
    text: Text,
    alphas: ConfigDict,
    examples: Sequence[Example],
    completions: Sequence[Sequence[int]],
) -> np.ndarray:
    """Returns the hierarchical reward f32[B] of completions, as if the cloud were always right.

    A completion is its tokens, with EOS where it was written. alphas: `config.reward`.
    """
    lengths = np.array([len(ids) for ids in completions])
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.full(mask.shape, text.pad_id, np.int32)
    tokens[mask] = np.concatenate(completions)
    ended = np.array([ids[-1] in text.eos_ids for ids in completions])
    verdicts = rollout.judge(task, text, examples, tokens, mask, ended)
    local = alphas.alpha_a * verdicts.correct + alphas.alpha_f * verdicts.formatted
    return np.where(verdicts.called, alphas.alpha_c, local).astype(np.float32)


def _grpo_settings(
    folder: str, config: ConfigDict, rows: int, group: int, max_new: int, micro_rows: int
) -> Any:
    """Returns the GRPOConfig of a step with `rows` completions; see `trl_step`."""
    from trl import GRPOConfig  # pyright: ignore[reportMissingImports] (an extra)

    return GRPOConfig(
        output_dir=folder,
        seed=config.seed,
        max_steps=1_000_000,
        num_generations=group,
        max_completion_length=max_new,
        generation_batch_size=rows,
        per_device_train_batch_size=micro_rows,
        gradient_accumulation_steps=rows // micro_rows,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        num_iterations=1,
        # With scale_rewards "none": GAPG's objective without its filter, times a constant.
        loss_type="dr_grpo",
        scale_rewards="none",
        learning_rate=config.optim.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=config.optim.weight_decay,
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        eval_strategy="no",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def trl_step(
    folder: pathlib.Path,
    examples: Sequence[Example],
    *,
    text: Text,
    task: Task,
    config: ConfigDict,
    prompts_per_step: int,
    group: int,
    max_new: int,
    micro_rows: int,
) -> HeldTrainer:
    """Returns run(), which does one full step of TRL's GRPOTrainer: sample, judge, update.

    It takes some of `examples` and returns the completions' tokens; `run.close()` ends it. Of
    `config` the weights of the reward are used, and AdamW's settings without the warm-up. In
    float32. micro_rows: completions of one backward pass; sampling is one batch in any case.
    """
    import datasets  # pyright: ignore[reportMissingImports] (an extra)
    import huggingface_hub.constants
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer  # pyright: ignore[reportMissingImports] (an extra)

    # The warnings are about how TRL calls it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL would report the set-up
    B = prompts_per_step * group
    held = HeldTrainer()

    class Hold(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            held.hold()

        def on_step_end(self, args, state, control, **_):
            held.passed()

    def reward(completion_ids, index, **_):
        held.tokens = sum(map(len, completion_ids))
        return rewards(
            task, text, config.reward, [examples[i] for i in index], completion_ids
        ).tolist()

    model = _load(folder, "float32")
    model.generation_config.eos_token_id = list(text.eos_ids)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(text.pad_id)
    # Strings rather than messages: TRL would render the chat template again for every row of every
    # step.
    prompts = [
        _prompt_string(tokenizer, text.prompt_ids(task.prompt(example))) for example in examples
    ]
    data = datasets.Dataset.from_dict({"prompt": prompts, "index": range(len(examples))})
    # The trainer wants a folder, and nothing is saved there.
    with tempfile.TemporaryDirectory() as scratch:
        settings = _grpo_settings(scratch, config, B, group, max_new, micro_rows)
        trainer = GRPOTrainer(
            model,
            reward,
            args=settings,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Hold()],
        )
    held.start(trainer.train)
    return held
