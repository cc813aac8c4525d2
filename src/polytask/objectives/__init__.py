"""What counts as learning: example transforms and losses."""
