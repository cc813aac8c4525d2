"""How it learns: trainer, stages, optimisers, gradient aggregation, checkpoints, distribution."""
