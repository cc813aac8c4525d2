"""Who learns: stems per modality, trunks, heads, hub loading, FLOP counting."""
