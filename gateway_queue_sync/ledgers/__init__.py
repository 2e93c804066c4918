"""Ledgers store which permits were granted, and what is left: in memory, or shared by processes."""
