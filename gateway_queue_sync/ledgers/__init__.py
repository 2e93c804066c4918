"""Ledgers: where it is kept who was granted what, when: in this process, or shared by processes."""
