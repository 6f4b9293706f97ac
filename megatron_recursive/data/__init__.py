"""Corpora, tokenizers and Megatron's indexed datasets: everything between raw text and ``--data-path``."""
