"""The bench: what it counts, by hand; that its models do what it says; its command line."""

import argparse
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util

from collab_jax.bench import measure, rehearse, runs, timed, work
from collab_jax.models import decoder, hf
from collab_jax.models import text as text_lib
from collab_jax.models.decoder import DecoderConfig
from collab_jax.rl import experiment
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError

LOAD = work.Load("tiny", "long_tail", 8, 4, 3, 16, "float32", 4)


def test_flop_by_hand():
    cfg = DecoderConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=6,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=3,
        rope_theta=1.0,
        norm_eps=1e-5,
        tied=True,
    )
    # A block: q 4x6, k and v 4x3, o 6x4, three of 4x6: 24 + 12 + 12 + 24 + 72 = 144 products, two
    # FLOP each, two blocks.
    token, head, seen = 576, 80, 4 * 2 * 6
    one = measure.forward_flop(cfg, np.array([0]), np.array([1]), logits=False)
    assert one == token + seen
    two = measure.forward_flop(cfg, np.array([5, 0]), np.array([2, 1]), logits=True)
    assert two == 3 * (token + head) + (6 + 7 + 1) * seen
    assert measure.parameters(cfg) == 2 * 144 + 40
    kv = 2 * 2 * 3 * 4  # a token's keys and values, two layers, four bytes
    lengths = np.array([1, 3])
    assert (
        measure.decode_bytes(cfg, 1, 5, lengths, 4, 4)
        == 3 * 328 * 4 + (1 + 1 + 2 + 3) * kv + 3 * 5 * kv
    )


def test_parameters_are_those_of_the_model():
    load = LOAD._replace(lengths="fixed")
    cfg, params = work.make_model(load)
    leaves = traverse_util.flatten_dict(params, sep="/")
    matrices = (x.size for name, x in leaves.items() if "norm" not in name)
    assert measure.parameters(cfg) == sum(matrices)


@pytest.mark.slow
@pytest.mark.long
def test_the_clock_ends_nine_rows_in_ten_at_a_quarter_and_the_peers_read_the_same(tmp_path):
    cfg, params = work.make_model(LOAD)
    case = work.decode(
        LOAD._replace(prompts=64), cfg, parallel.replicate(params), segments=2, slot_counts=2
    )
    rows = 64 * 4
    useful = case.run()
    short = (rows * 16 - useful) / 12  # a short row has 4 tokens, a long one 16
    assert short == int(short) and abs(short / rows - 0.9) < 0.1
    lengths = np.array([4] * int(short) + [16] * (rows - int(short)))
    flop = measure.forward_flop(cfg, np.zeros(64), np.full(64, 3), logits=False)
    flop += measure.forward_flop(cfg, 2.0, lengths, logits=True)
    assert case.flop() == pytest.approx(flop)
    assert case.bytes() == pytest.approx(measure.decode_bytes(cfg, 64, 3, lengths, 4, 4))
    work.save(LOAD, params, tmp_path)
    again = hf.load(tmp_path, hf.config_from_hf(hf.read_config(tmp_path)), "float32")
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow
@pytest.mark.long
def test_the_fixed_mix_runs_every_row_to_the_limit_and_the_update_learns_from_all():
    load = LOAD._replace(lengths="fixed")
    cfg, params = work.make_model(load)
    assert work.decode(load, cfg, parallel.replicate(params), 1, 1).run() == 8 * 4 * 16
    case = work.update(load, cfg, params)
    assert case.run() == 8 * 4 * 16
    batch = work.update_batch(load)
    assert batch.mask.all() and (batch.correct.any(1) & ~batch.correct.all(1)).all()
    assert work.response_lengths(LOAD).min() == 4 and case.flop() == measure.update_flop(
        cfg, 3, np.full((8, 4), 16)
    )


def test_interleaved_runs_take_turns_and_ratios_are_of_one_round():
    order = []
    timers = {name: lambda name=name: order.append(name) or 2.0 for name in "ab"}
    measure.PAUSE, before = 0.0, measure.PAUSE
    try:
        timings = measure.interleaved(timers, repeats=3, say=lambda _: None)
    finally:
        measure.PAUSE = before
    assert "".join(order) == "aabb" + "ab" * 3
    assert len(timings["a"].seconds) == 3 and timings["a"].work == [2.0] * 3
    assert timings["a"].rate == 6 / sum(timings["a"].seconds)
    a = measure.Timing(0.0, [1.0, 2.0, 4.0], [6.0, 6.0, 6.0])
    b = measure.Timing(0.0, [1.0, 4.0, 4.0], [2.0, 2.0, 2.0])
    assert measure.ratio(a, b)["median"] == 3.0 and a.median == 2.0 and a.rate == 18 / 7


def test_number():
    assert [measure.number(x) for x in (0, 12.345, 12345.0, 2.5e11)] == [
        "0",
        "12.3",
        "12.3k",
        "250G",
    ]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "collab_jax.bench", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.long
def test_command_line_writes_a_table_and_json(tmp_path):
    sizes = [
        "--prompts",
        "2",
        "--group",
        "2",
        "--max_new",
        "8",
        "--prompt_length",
        "4",
        "--repeats",
        "2",
    ]
    out = command("decode", *sizes, "--json", str(tmp_path / "figures.json"))
    assert out.returncode == 0, out.stderr
    assert "decode tiny long_tail: ours is" in out.stdout and "ceilings: matmul" in out.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    case = figures["figures"]["decode tiny fixed: ours"]
    seconds = case["seconds"]  # two rounds of 2 x 2 responses of 8 tokens
    assert len(seconds) == 2 and case["tokens_per_s"] == pytest.approx(2 * 32 / sum(seconds))
    cfg, _ = work.make_model(LOAD._replace(lengths="fixed"))
    flop = measure.forward_flop(cfg, np.zeros(2), np.full(2, 4), logits=False)
    flop += measure.forward_flop(cfg, 3.0, np.full(4, 8), logits=True)
    ceiling = figures["ceilings"]["matmul_flop_s"]
    assert case["matmul_share"] == pytest.approx(flop / seconds[-1] / ceiling)
    assert figures["machine"]["devices"].startswith("2 x")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["decode", "--shape", "huge"], "--shape=huge: use one of"),
        (["update", "--prompts", "3"], "--prompts=3 must be a multiple of the 2 devices"),
        (["step", "--cpu_devices", "0"], "must be at least 1"),
        (["nothing"], "invalid choice"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, says):
    out = command(*arguments)
    assert out.returncode != 0 and says in out.stderr and "Traceback" not in out.stderr


@pytest.fixture
def bare(tmp_path):
    """A model folder with nothing but its architecture."""
    load = LOAD._replace(lengths="fixed")
    (tmp_path / "config.json").write_text(json.dumps(work.hf_config(load) | {"vocab_size": 300}))
    return tmp_path


def number(text):
    """The inverse of `measure.number`."""
    text = text.strip()
    return float(text[:-1]) * 1000 if text.endswith("k") else float(text)


@pytest.mark.slow
@pytest.mark.long
def test_a_rehearsal_runs_the_real_step_and_learns_from_every_prompt(small, bare):
    sizes = {
        "prompts_per_step": 2,
        "group": 2,
        "max_new_tokens": 8,
        "decode__slot_counts": 1,
    }
    page = rehearse.rehearse(small(model__path=str(bare), **sizes), layers=1, steps=2)
    assert (
        "1 blocks, random weights, a made-up tokenizer" in page
        and "MiB on each of 2 devices" in page
    )
    steps = [
        line.split("|")[1:]
        for line in page.splitlines()
        if line.startswith(("| 1 (compiles)", "| 2 "))
    ]
    assert len(steps) == 2
    for _, rollout_s, _, update_s, share, tokens, rate, asked, drift, _ in steps:
        assert 2 * 2 * 7 <= int(tokens) <= 2 * 2 * 8 and int(asked) == 2
        assert 0 <= float(drift) < 0.01
        seconds, tolerance = float(rollout_s) + float(update_s), 0.01  # each rounded to 0.01
        low, high = (
            int(tokens) / (seconds + tolerance),
            int(tokens) / max(seconds - tolerance, 1e-3),
        )
        assert 0.99 * low <= number(rate) <= 1.01 * high  # three digits
        assert share.strip().endswith("%")


def test_a_made_up_tokenizer_has_the_special_tokens_whole_and_fits_the_model(small):
    names = {"text__pad": "<pad>", "text__eos": ("<eos>",), "text__decision_token": "<unknown>"}
    config = small(**names)
    tokenizer = rehearse.make_up_tokenizer(["What is 1 + 2?"] * 3, config, 300)
    assert (
        len(tokenizer) <= 300
        and tokenizer.decode(tokenizer.encode("What is 2 + 1?")) == "What is 2 + 1?"
    )
    assert all(len(tokenizer.encode(t)) == 1 for t in ("<pad>", "<eos>", "<unknown>"))
    with pytest.raises(UserError, match="at least 2.. tokens, and this model's vocabulary is 100"):
        rehearse.make_up_tokenizer(["a"], config, 100)


def test_a_made_up_tokenizer_has_special_tokens_to_be_found(small, tmp_path):
    config = small()
    rehearse.make_up_tokenizer(["1 + 2 <answer>"], config, 300).save_pretrained(tmp_path)
    found = text_lib.load(tmp_path, config.text).special
    assert found == (("<|end|>",), "<|pad|>", "<|reserved|>")


def test_half_of_each_group_counts_as_right_after_it_was_judged():
    batch = work.update_batch(LOAD).replace(
        correct=np.zeros((8, 4), bool), called=np.ones((8, 4), bool)
    )
    right = runs.half_right(batch)
    assert right.correct.tolist() == [[True, False, True, False]] * 8 and not right.called.any()


@pytest.mark.slow
@pytest.mark.parametrize("filter", ["none", "d1d2"])
def test_a_full_step_without_a_filter_learns_from_every_prompt(small, tmp_path, filter):
    run = experiment.prepare(small(algorithm__filter=filter), tmp_path)
    step = runs.FullStep(run)
    assert step() > 0
    learnt = step._row["kept"] - step._row["no_signal"]
    assert (learnt == run.config.prompts_per_step) == (filter == "none")


def test_settings_of_a_rehearsal_are_read_as_everywhere(bare, small, tmp_path):
    file = "configs/countdown_tiny.py"
    assert (
        rehearse.read_config(file, ["--config.group=6", "--config.text.eos=('a','b')"]).group == 6
    )
    for wrong, says in (
        (["--config.grup=6"], "grup"),
        (["stray"], "unexpected argument 'stray'"),
        (["--layer=2"], "layer"),
    ):
        with pytest.raises(UserError, match=says):
            rehearse.read_config(file, wrong)
    (half := tmp_path / "half.py").write_text("def get_config(:")
    for unusable, says in (
        ("configs/nope.py", "nope.py"),
        (str(half), "invalid syntax .half.py, line 1"),
    ):
        with pytest.raises(UserError, match=says):
            rehearse.read_config(unusable, [])
    with pytest.raises(UserError, match="--layers=9 must lie in 1 to 4"):
        rehearse.rehearse(small(model__path=str(bare)), layers=9, steps=1)


def test_random_models_have_the_shapes_of_their_names():
    counts = {}
    for shape in work.SHAPES:
        cfg = hf.config_from_hf(work.hf_config(LOAD._replace(shape=shape, lengths="fixed")))
        shapes = jax.eval_shape(lambda cfg=cfg: decoder.init(cfg, jax.random.key(0)))
        counts[shape] = sum(x.size for x in jax.tree.leaves(shapes)) / 1e6
    assert counts["tiny"] == pytest.approx(0.79, abs=0.01) and counts["25m"] == pytest.approx(
        25, abs=1
    )
    assert counts["qwen2.5-0.5b"] == pytest.approx(494, abs=1) and counts[
        "qwen2.5-1.5b"
    ] == pytest.approx(1544, abs=1)


def test_a_step_is_timed_of_shapes_that_have_a_run():
    with pytest.raises(UserError, match="25m: a step is timed of tiny or smollm2-135m"):
        timed.make_training(argparse.Namespace(shape="25m"))
