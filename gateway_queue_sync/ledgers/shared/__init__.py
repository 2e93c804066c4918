"""Ledgers that processes share: what is said, the rules of turns, and one process's side of it."""
