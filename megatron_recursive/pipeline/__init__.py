"""Recursion across pipeline stages: the ring."""
