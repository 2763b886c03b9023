"""Speed: `python -m collab_jax.bench`. Nothing here is used elsewhere; all may be imported here.

Where the time of a step of the tiny model goes (two cores with AVX-512, two host devices, jax
0.10.2; from `jax.profiler` with `XLA_FLAGS=--xla_cpu_enable_xprof_traceme=true`, sums over both
devices' threads, 2026-11-23). Two fifths are sampling, three fifths the update.

Sampling: some 55 % are matrix products (of which attention over the cache a fifth), 10 % the
rotation and transposition of queries, which the shared prompt and the row's own columns want in two
layouts, 8 % the write of a column into the cache (its keys lie along columns, so that is one cache
line a number; reading is three times as fast for it), the rest norms, SiLU, softmax, the draw. A
column of 32 rows costs a third of one of 128, not a quarter: so slots below MIN_SLOTS do not pay.

Update: 40 to 45 % are the products of projections and MLP, 10 % those of attention, 10 % the
backward pass of the norms of queries and keys, 8 % transpositions between rows and heads, 8 % SiLU
and its gradient, 5 % the sum over the two pieces of attention, 5 % the prompts' own passes.
Micro-batches of 8 rows keep the activations of a block in the second-level cache; 16 rows took 1.3
times as long. Half of the loops that are not products run at several nanoseconds a number, since
XLA's CPU compiler fuses transpositions into them and does not vectorise the result. Tried without
effect: wider vectors, fast-math flags, oneDNN, XNNPACK, optimization barriers, norms with a
hand-written gradient, one attention product over joined keys. What helped: keys by columns, cutting
responses to their length, the rotation by reversal, small micro-batches.

Floor: the useful FLOP of a step (about 45 G: a forward pass for each sampled token, three for each
one that the update uses) at the ceiling of a large product, 0.2 to 0.25 s. The 128-wide products of
this model alone run at two thirds of that ceiling.
"""
