"""``python -m gateway_queue_sync``."""

import sys

from gateway_queue_sync.cli import main

if __name__ == "__main__":
    sys.exit(main())
