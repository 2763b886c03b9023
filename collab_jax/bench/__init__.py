"""Speed: `python -m collab_jax.bench`. Nothing here is used elsewhere."""
