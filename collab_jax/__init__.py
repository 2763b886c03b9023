"""collab_jax: train a small device LLM that knows when to ask the cloud (GAPG, arXiv 2509.24050)."""

from collab_jax.runtime import process

__version__ = "0.1.0"

process.restart_with_allocator()
