"""Entry point of the core process: `python -m tercet.core_proc`, started by the launcher."""

from __future__ import annotations

import sys

from tercet.ipc.child import adopt

if __name__ == "__main__":
    import signal

    # SIGTERM, not SIGKILL: this process removes the socket files of an engine whose parent was killed.
    child = adopt(signal.SIGTERM)
    from tercet.core_proc.main import main

    sys.exit(main(child))
