"""Use it: predict, generate, score, retrieve."""
