"""Starting runs: starts and their evidence, batches, budgets, the catalogue of techniques."""
