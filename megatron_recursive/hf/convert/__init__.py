"""Conversion from and to Hugging Face: sources, mappings, import, export, and the proof of each."""
