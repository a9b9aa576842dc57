"""One API server of several, as a child of `tercet serve --api-server-count N`."""

from __future__ import annotations

import signal
import sys

from tercet.ipc.child import ChildProcess

if __name__ == "__main__":
    child = ChildProcess.from_arguments()
    child.tie(signal.SIGKILL)  # first of all: before heavy imports
    from tercet.frontend.server.child import main

    sys.exit(main(child))
