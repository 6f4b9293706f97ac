"""The Hugging Face model: what ships with an export. These files import torch and transformers alone."""

# What an export folder carries, so that it loads without this package (trust_remote_code).
REMOTE_CODE_FILES = (
    "configuration_recursive_gpt.py",
    "modeling_recursive_gpt.py",
    "passes_recursive_gpt.py",
    "layers_recursive_gpt.py",
    "exits_recursive_gpt.py",
    "generation_recursive_gpt.py",
    "cache_recursive_gpt.py",
)
