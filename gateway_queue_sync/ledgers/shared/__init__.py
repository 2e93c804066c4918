"""Shared ledgers: their messages, their rules, and one process's side of the protocol."""
