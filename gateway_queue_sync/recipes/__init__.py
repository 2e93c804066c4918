"""How bot libraries use the queue: one file for each, and a README that says which."""
