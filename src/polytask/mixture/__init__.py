"""What is learned next: samplers, policies, packing, the ledger."""
