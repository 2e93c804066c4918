"""How good the queue is at what it exists for, next to what else people would use, and to the floor.

``python -m benchmarks --help``; the peers and the charts need ``pip install -e '.[bench]'``.
"""
