"""Compares the queue with other limiters, and with the least that Python needs for the same.

``python -m benchmarks --help``; the peers and the charts need ``pip install -e '.[bench]'``.
"""
