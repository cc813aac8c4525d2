"""Compare honestly: arms, budgets, seeds, statistics, evidence."""
