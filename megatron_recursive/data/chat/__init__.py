"""Conversations: their formats, how a tokenizer's template writes them, and which of the tokens are supervised."""
