"""What a start is made of: inputs, keys of rows, tags, and the budgets that it counts in."""
