"""Trains a small device LLM that knows when to ask the cloud (GAPG, arXiv 2509.24050)."""

__version__ = "0.1.0"
