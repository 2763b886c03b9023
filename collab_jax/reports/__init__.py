"""What a person reads: reports of a run, a sweep, a suite, a comparison; their figures and pages.
Imports `routing`, `rl` and below; only the commands and `bench` import it.
"""
