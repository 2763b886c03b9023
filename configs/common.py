"""Every configuration key once, with its default: the tiny Countdown model on two CPU cores.

The other files here start from this one and say only what differs. On the command line:
`--config.KEY=VALUE`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of sampling, the prompts' order, the filter's draw; in a warm start, of weights and data
    config.budget = (
        0.1  # share of queries that may go to the cloud, in [0, 1); rho = budget / (1 - budget)
    )
    config.group = 8  # G, responses for each prompt, at least 2
    config.prompts_per_step = (
        32  # Q, prompts in the global batch; a multiple of the number of devices
    )
    config.prompt_length = 16  # L, tokens; a longer prompt is refused
    config.max_new_tokens = 56  # T, tokens of a response, EOS included
    config.temperature = 1.0  # of training rollouts; the gradient is that of this distribution
    config.cpu_devices = (
        2  # host devices where there is no accelerator; the global batch is split over them
    )

    config.decode = ConfigDict()
    config.decode.segments = (
        2  # pieces of a response's KV cache, of which the filled are read; more: more to compile
    )
    config.decode.slot_counts = (
        3  # programs for all rows, for half, a quarter ...: a long tail runs in a small one
    )
    config.decode.cache_dtype = "float32"  # of the KV cache

    config.model = ConfigDict()
    config.model.path = "countdown-tiny"  # Hugging Face folder, hub name, or a bundled model's name
    config.model.dtype = "float32"  # of the computation
    config.model.param_dtype = (
        "float32"  # of the parameters that are trained and of the optimizer state
    )

    config.lora = (
        ConfigDict()
    )  # train an adapter instead of the parameters, which stay as they are, in model.dtype
    config.lora.rank = 0  # of the adapter; 0: no adapter
    config.lora.alpha = 32.0  # its product counts alpha / rank
    config.lora.targets = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )  # in each block

    config.text = ConfigDict()
    config.text.marker = "<unknown> I need external assistance </unknown>"  # the call, as text
    config.text.decision_token = (
        "<unknown>"  # decides a call: the marker's first, or a reserved one; "": plain text
    )
    config.text.pad = "<pad>"  # token that fills rows
    config.text.eos = ("<eos>",)  # every token that ends a response

    config.task = ConfigDict()
    config.task.name = "countdown"  # a key of collab_jax.tasks.TASKS, or mix
    config.task.mix = ()  # of mix: (task, weight) pairs, as (("math", 3), ("gsm8k", 1)); a weight is a share of prompts
    config.task.reward = (
        ""  # path/to/file.py:function(example, response) -> bool, 0 ... 1 or None, for the verifier
    )
    config.task.judge = (
        ""  # a model of config.cloud that judges answers in the verifier's place; "": none
    )
    config.task.data_dir = (
        "~/tensorflow_datasets"  # NAME.jsonl(.gz) here if there; else the data set built below it
    )
    config.task.prompt = (
        "{numbers}={target}"  # the device model's prompt; a real model wants a sentence
    )
    config.task.share_of_three = 0.3  # share of prompts with three numbers; the others have four
    config.task.numbers = (1, 50)  # lowest, highest
    config.task.targets = (10, 99)  # lowest, highest
    config.task.train_examples = 16384  # size of the training split
    config.task.test_examples = 8192  # size of the held-out split
    config.task.data_seed = 0  # of the data set, not of a run
    config.task.demo_length = 56  # longest demonstration, in tokens of the tiny vocabulary
    config.task.demo_give_up = 0.15  # share of demonstrations that end with the marker
    config.task.demo_guess = (
        0.2  # share that answer with an attempt that failed, and claim it where it came near
    )

    config.cloud = ConfigDict()
    config.cloud.kind = (
        "simulated"  # simulated (the task's exact solver) | openai (any compatible API) | local
    )
    config.cloud.model = (
        "simulated-r1"  # part of each stored answer's key; local: a Hugging Face folder or hub name
    )
    config.cloud.parameters = ConfigDict(
        {"temperature": 0.6, "max_tokens": 8192}
    )  # of its sampling; openai: any
    config.cloud.store = ""  # SQLite file of all answers; "": cloud.sqlite in the workdir
    config.cloud.mode = (
        "live"  # live | record: a failed call is an error | replay: nothing is bought
    )
    config.cloud.wait = 60.0  # seconds a training step waits for verdicts after sampling; the rest are unknown to it
    config.cloud.prefetch = (
        0  # steps ahead whose prompts are all asked; 0: only needed ones, when they are
    )
    config.cloud.retries = 5  # of a failed call
    config.cloud.max_calls = placeholder(
        int
    )  # hard limit of a store's requests, retries included; none: no limit
    config.cloud.max_usd = placeholder(float)  # hard limit of a store's spending; none: no limit
    config.cloud.when_spent = (
        "continue"  # continue: what is not bought is unknown | stop: save, end with an error
    )
    config.cloud.share_attempt = (
        False  # evaluation also hands calls over with the device's reasoning, and compares
    )
    config.cloud.error_rate = (
        0.062  # simulated: share it gets wrong, by a hash (DeepSeek-R1 had 93.8 % in the paper)
    )
    config.cloud.seconds = 8.0  # simulated latency of a call; booked, not waited for
    config.cloud.usd_per_million_input = 0.55  # simulated price
    config.cloud.usd_per_million_output = 2.19  # simulated price
    config.cloud.base_url = (
        "https://api.openai.com/v1"  # openai: of the provider, or of your own server
    )
    # The provider is part of each stored answer's key. It is the base_url unless it is named: a name
    # keeps the answers when the address changes, as to a mirror, or with your own server's host.
    config.cloud.provider = config.cloud.get_oneway_ref("base_url")  # openai: who serves the model
    config.cloud.key_env = (
        "OPENAI_API_KEY"  # openai: environment variable that holds the key; "": none is needed
    )
    config.cloud.concurrency = 16  # openai: calls in flight
    config.cloud.timeouts = (
        10.0,
        600.0,
        900.0,
    )  # openai: seconds to connect, without a byte, of a whole call
    config.cloud.prices = (
        ("deepseek-reasoner", 0.55, 2.19),
    )  # openai: model, USD per million input and output tokens
    config.cloud.prices_date = "2025-01-20"  # when they were looked up; told beside every sum
    config.cloud.batch_size = 16  # local: prompts sampled at a time
    config.cloud.prompt_length = 1024  # local: tokens; a longer prompt fails

    config.reward = ConfigDict()  # alpha_a > alpha_c > alpha_f >= 0
    config.reward.alpha_a = 2.0  # correct on the device
    config.reward.alpha_c = 0.5  # called, and the cloud is right
    config.reward.alpha_f = 0.2  # well formed and local

    config.algorithm = ConfigDict()
    config.algorithm.reward = (
        "hierarchical"  # hierarchical | task: as if the cloud were never right
    )
    config.algorithm.advantage = (
        "gapg"  # gapg (leave-one-out) | grpo | dr_grpo | standard (grpo, tokens summed)
    )
    config.algorithm.solo = (
        0  # so many responses of a group may not call: they learn to solve, the others when to call
    )
    config.algorithm.filter = (
        "d1d2"  # d1d2 | mixed (D1 without the always solved) | zero_variance | none
    )
    config.algorithm.control = (
        "none"  # of the share of calls: lagrangian (DA-GRPO) | dual_alpha_c | none
    )
    config.algorithm.control_rate = (
        0.02  # how far a step moves the control's variable, in reward per share of calls
    )

    config.optim = ConfigDict()
    config.optim.learning_rate = 5e-5  # AdamW, after the warm-up
    config.optim.warmup_steps = 10  # linear, from 0
    config.optim.decay = False  # cosine to 0 at the last step, or else constant
    config.optim.weight_decay = 0.0  # of matrices
    config.optim.average = (
        0.0  # decay of the averaged weights that a run evaluates and exports; 0: the last ones
    )
    config.optim.clip_norm = 1.0  # global gradient norm

    config.train = ConfigDict()
    config.train.steps = 160  # updates
    config.train.micro_rows = (
        8  # responses of one backward pass on one device; bounds memory, not the result
    )
    config.train.lengths = (
        4  # lengths they are cut to, about T / 4, T / 2 ...; more: less padding, more to compile
    )
    config.train.logprob_chunk = 64  # columns of logits alive at once
    config.train.remat = (
        False  # recompute each block in the backward pass: less memory, a third more time
    )
    config.train.checkpoint_every = 40  # steps
    config.train.empty_d1_limit = 20  # steps in a row without a solved prompt before the run stops

    config.eval = ConfigDict()
    config.eval.prompts = (
        4096  # from the start of the test split, before and after training; 0: no evaluation
    )
    config.eval.fit_prompts = (
        0  # unused training prompts, after training, to fit learned routers on (fit.parquet)
    )
    config.eval.batch_size = 256  # rows; a multiple of the number of devices
    config.eval.samples = (
        16  # of --suite: responses a prompt on its small benchmarks, whose mean counts (avg@k)
    )
    config.eval.temperature = 0.6  # of --suite: of these responses; all others are greedy

    config.routers = (
        ConfigDict()
    )  # that run the model once more after training, kept as columns of the records
    config.routers.record = ()  # of agreement, hidden, classifier, verification
    config.routers.samples = 5  # agreement: responses beside the recorded one
    config.routers.classifier = (
        ""  # decoder folder to fine-tune, with the device model's vocabulary; "": model.path
    )
    config.routers.epochs = 8  # classifier: passes over the eval.fit_prompts
    config.routers.batch_size = (
        64  # classifier: prompts of an update; a multiple of the number of devices
    )
    config.routers.learning_rate = 3e-4  # classifier: AdamW, after the warm-up; then cosine to 0
    config.routers.verify_prompt = (
        ""  # verification: a question with {response} and, if wanted, {prompt} in it
    )
    config.routers.yes = "Yes"  # verification: how the device says that it was right
    config.routers.no = "No"  # and wrong; the first tokens are compared

    config.sft = ConfigDict()  # the warm start, python -m collab_jax.sft
    config.sft.source = "task"  # of demonstrations: task | file | self (own right samples, and calls where it fails)
    config.sft.demonstrations = ""  # file: JSON lines, as collab_jax/rl/demonstrations.py says
    config.sft.prompts = 0  # self: training prompts to answer, `group` times each; 0: all
    config.sft.keep = 2  # self: right responses kept of a prompt
    config.sft.marker_share = 0.2  # self: largest share of demonstrations that call, in [0, 1)
    config.sft.check_prompts = (
        64  # training prompts, the last ones, to try the tuned model on (sft.json); 0: none
    )
    config.sft.steps = 0  # updates
    config.sft.batch_size = 256  # demonstrations of an update
    config.sft.micro_rows = 32  # demonstrations of one backward pass on one device
    config.sft.learning_rate = 2e-3  # AdamW, after the warm-up; then cosine to 0
    config.sft.warmup_steps = 100  # linear, from 0
    config.sft.weight_decay = 0.01  # of matrices
    config.sft.architecture = placeholder(
        dict
    )  # config.json of a model made from nothing; none: start at model.path
    config.sft.words = ()  # vocabulary of a model made from nothing
    return config
