"""The recursion core, its heads, and the GPT model around them."""
