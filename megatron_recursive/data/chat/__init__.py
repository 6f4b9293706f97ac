"""Conversations: their preparation and packing."""
