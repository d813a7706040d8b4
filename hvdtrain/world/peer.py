"""The heartbeat's side of a connection to another rank: one JSON object a line, sent and received without waiting."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from hvdtrain.process.progress import Place

_LONGEST_LINE = 256 << 10


@dataclass
class Peer:
    """A rank at the other end of a connection."""

    socket: socket.socket
    name: str
    place: Place = field(default_factory=lambda: Place(None, "start", 0.0))
    heard: float = field(default_factory=time.monotonic)
    unread: bytes = b""
    unsent: bytes = b""
    has_left: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, **message: Any) -> None:
        """Send, or keep what does not fit; a report is dropped while something is left. Never waits.

        A peer that does not read is found out by its silence.
        """
        with self.lock, contextlib.suppress(OSError):
            if "place" not in message or not self.unsent:
                self.unsent += json.dumps(message).encode() + b"\n"
            sent = self.socket.send(self.unsent, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            self.unsent = self.unsent[sent:]

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that have come in; None: the connection is over."""
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        *lines, self.unread = (self.unread + data).split(b"\n")
        if not data or len(self.unread) > _LONGEST_LINE:
            return None
        self.heard = time.monotonic()
        return [json.loads(line) for line in lines]

    def where(self) -> Place:
        """Return where it is now, or was when it last reported."""
        return self.place._replace(age_s=self.place.age_s + time.monotonic() - self.heard)
