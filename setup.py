from pathlib import Path

from setuptools import find_packages, setup

readme = Path(__file__).with_name("README.md")

setup(
    name="collab_jax",
    version="0.1.0",
    description="Post-trains a device LLM by reinforcement learning to solve what it can and ask a cloud LLM otherwise",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["collab_jax", "collab_jax.*"]),
    package_data={"collab_jax": ["assets/**/*"]},
    # Floors only: an upper pin here would hold back every project this one is installed beside.
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "transformers>=5",
        "tensorflow-datasets>=4.9.9",
        "ml-collections>=1.1",
        "absl-py>=2",
        "array_record>=0.8",
        "importlib_resources>=6",  # tensorflow-datasets imports it without asking for it
        "safetensors>=0.5",
        "jinja2>=3.1",
        "markdown>=3.5",
        "math-verify[antlr4_13_2]>=0.8",
        "openai>=3",
        "numpy>=2",
        "scipy>=1.12",
        "scikit-learn>=1.5",
        "pyarrow>=20",
        "matplotlib>=3.9",
        "tensorboardX>=2.6",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": ["pytest", "ruff", "nbclient", "nbformat", "ipykernel"],
        "peers": [
            "torch",
            "trl",
            "datasets",
        ],  # what `python -m collab_jax.bench peers` compares with
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
    },
)
