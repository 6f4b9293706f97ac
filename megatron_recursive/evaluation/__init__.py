"""Evaluation by lm-eval, the language model evaluation harness."""
