"""How bot libraries use the queue: one file for each. ``README.md`` lists them."""
