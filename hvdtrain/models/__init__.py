"""Models: the native decoder, the classic MLP, and the n-gram baseline."""
