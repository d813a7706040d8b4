"""A run, seen live in the terminal: by its files alone, without a lock and without torch."""
