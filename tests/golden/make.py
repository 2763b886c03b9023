"""Makes the golden files: tiny random Hugging Face checkpoints and what transformers computes with
them.

    python tests/golden/make.py   # needs torch and transformers; rewrites these folders

`golden.npz` of each folder: tokens i32[R, S] padded on the right, lengths i32[R], logits f32[R, S,
V] (each row computed alone; 0 past its length) and greedy i32[R, N], the greedy continuation of
each row. `test_parity.py` reads the files, and calls the functions here where torch is installed.
"""

import json
import pathlib
import shutil

import numpy as np

VOCAB, LENGTHS, NEW_TOKENS = 48, (12, 7, 1), 8
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
)
# Wavelengths at head_dim 8 and theta 500.5: 6.3 (kept), 29.7 (between), 140 and 665 (scaled).
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
DEFAULT = dict(rope_type="default", rope_theta=123.4)

# Each family with the head tied and untied, and with every bias that it can have.
GOLDEN = {
    "llama": dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=3e-5,
        rope_parameters=LLAMA3,
        tie_word_embeddings=True,
    ),
    "qwen2": dict(
        num_attention_heads=4,
        num_key_value_heads=1,
        rms_norm_eps=7e-4,
        rope_parameters=DEFAULT,
        tie_word_embeddings=False,
    ),
    "qwen3": dict(
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=12,
        rms_norm_eps=2e-3,
        rope_parameters=DEFAULT,
        tie_word_embeddings=True,
    ),
    "llama-untied-biases": dict(
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-2,
        rope_parameters=DEFAULT,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
    ),
    "qwen2-tied": dict(
        num_attention_heads=2,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_parameters=LLAMA3,
        tie_word_embeddings=True,
    ),
    "qwen3-untied-biases": dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-5,
        rope_parameters=DEFAULT,
        tie_word_embeddings=False,
        attention_bias=True,
    ),
}


def random_model(name: str, settings: dict, seed: int):
    """A transformers model of the family that `name` begins with, its every weight, norms and
    biases too, drawn at random.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**COMMON, **settings, "rope_parameters": dict(settings["rope_parameters"])}
    config = AutoConfig.for_model(name.split("-")[0], **settings)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if name.endswith("bias"):
                weight.copy_(0.3 * noise)
            elif weight.ndim == 1:
                weight.copy_(1 + 0.3 * noise)
            else:
                weight.copy_(noise if "embed" in name else 1.5 * noise / weight.shape[1] ** 0.5)
    return model


def logits_of(model, row) -> np.ndarray:
    """f32[S, V] of one row of tokens, by transformers."""
    import torch

    with torch.no_grad():
        return (
            model(input_ids=torch.tensor(row)[None].long(), use_cache=False)
            .logits[0]
            .float()
            .numpy()
        )


def expected(model, seed: int) -> dict[str, np.ndarray]:
    """What stands in golden.npz, for rows drawn from `seed`. Greedy steps are far from ties."""
    draw = np.random.default_rng(seed)
    tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    logits = np.zeros((*tokens.shape, VOCAB), np.float32)
    greedy = np.zeros((len(LENGTHS), NEW_TOKENS), np.int32)
    for i, length in enumerate(LENGTHS):
        row = draw.integers(VOCAB, size=length).tolist()
        tokens[i, :length], logits[i, :length] = row, logits_of(model, row)
        for t in range(NEW_TOKENS):
            last = logits_of(model, row)[-1]
            second, first = np.sort(last)[-2:]
            assert first - second > 1e-3, "a near tie: take another seed"
            row.append(int(last.argmax()))
            greedy[i, t] = row[-1]
    return dict(tokens=tokens, lengths=np.array(LENGTHS, np.int32), logits=logits, greedy=greedy)


def main():
    for seed, (name, settings) in enumerate(GOLDEN.items()):
        folder = pathlib.Path(__file__).parent / name
        shutil.rmtree(folder, ignore_errors=True)
        model = random_model(name, settings, seed)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "golden.npz", **expected(model, seed))
        print(name, json.dumps({p.name: p.stat().st_size for p in sorted(folder.iterdir())}))


if __name__ == "__main__":
    main()
