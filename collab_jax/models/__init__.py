"""The device model: decoder, sampler, log-probabilities, text, adapters, Hugging Face folders.
Imports `runtime` alone. `gapg`, the tasks and clouds, and all above them build on it.
"""
