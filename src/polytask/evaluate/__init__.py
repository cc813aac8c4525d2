"""Judge it: metrics, transfer and forgetting."""
