"""One token through the block of a GPT, against the keys and values of those before it."""
