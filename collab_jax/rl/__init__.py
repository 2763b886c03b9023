"""Training: what a run is made of, its rollouts, its steps, its evaluation and its warm start.
Imports `gapg`, `records`, `tasks`, `cloud` and what these import; never `routing` or `reports`.
"""
