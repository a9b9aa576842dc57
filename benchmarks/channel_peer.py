"""The far side of bench_channel.py: `python -m benchmarks.channel_peer ADDRESS INLINE_BYTES COPY_BYTES`.

Answers what asks for an answer (`epoch` 1) with the same array, swallows the rest, and answers the last of a flood
(`epoch` 2), so that the near side can time how long all of it took.
"""

from __future__ import annotations

import sys
from typing import Any

from tercet.ipc import channel
from tercet.ipc.channel import DealerEnd
from tercet.ipc.codec import Encoder
from tercet.ipc.messages import Abort, Shutdown

PING, FLOOD, LAST = 1, 0, 2
ECHO_INBOX: Any = Abort | Shutdown


def tune(end: Any, inline_bytes: int, copy_bytes: int) -> None:
    """Set the thresholds of an end, and of this process."""
    end._encoder = Encoder(inline_bytes)
    end._socket.copy_threshold = 0  # pyzmq's own would come before ours
    channel.COPY_BYTES = copy_bytes  # type: ignore[misc]


def main(address: str, inline_bytes: int, copy_bytes: int) -> None:
    with DealerEnd[Any](address, ECHO_INBOX) as end:
        tune(end, inline_bytes, copy_bytes)
        end.send(Shutdown(epoch=0))  # here I am
        while True:
            match end.recv():
                case Abort(epoch=epoch, handles=handles):
                    if epoch != FLOOD:
                        end.send(Abort(epoch=epoch, handles=handles if epoch == PING else handles[:1]))
                case Shutdown():
                    return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
