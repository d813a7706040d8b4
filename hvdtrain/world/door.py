"""The door by which ranks reach rank 0's heartbeat, and nobody else.

Who connects proves first that it knows the job's token, by an answer to a challenge (HMAC-SHA256; the token itself
never travels here, ranks have it by a broadcast), and is shown the same proof in return. All of it is of fixed length:

    rank 0 -> visitor   32 bytes   a number that is used once
    visitor -> rank 0   68 bytes   its own such number, its rank, HMAC(token, "rank", both numbers, rank)
    rank 0 -> visitor   32 bytes   HMAC(token, "rank 0", both numbers, rank)

Until then nothing is parsed and nothing is told. Visitors that have not proven anything have some seconds, and are
limited in number: the oldest goes first. When all ranks are in, the door is closed and nothing listens any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import resource
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_NUMBER_BYTES = 32
_PROOF_BYTES = hashlib.sha256().digest_size
_ANSWER = struct.Struct(f"!{_NUMBER_BYTES}sI{_PROOF_BYTES}s")
_SECONDS_TO_PROVE = 5.0
MOST_VISITORS = 64
_MOST_LISTENERS = 8
_OTHER_FILES = 512


@dataclass
class _Visitor:
    number: bytes
    """That it was challenged with."""
    deadline: float
    received: bytes = b""


@dataclass(eq=False)
class Door:
    """Listens at some addresses; `arrivals` must be called whenever it is readable, and every second or so.

    A selector may watch it: it has a `fileno`.
    """

    token: bytes
    size: int
    """Ranks of the job."""
    most_visitors: int = MOST_VISITORS
    seconds_to_prove: float = _SECONDS_TO_PROVE
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _listeners: list[socket.socket] = field(default_factory=list)
    _visitors: dict[socket.socket, _Visitor] = field(default_factory=dict)
    _admitted: set[int] = field(default_factory=set)

    def listen(self, addresses: Iterable[str]) -> list[tuple[str, int]]:
        """Begin to listen at ports that the system chooses; returns address and port of those that can be had."""
        _allow_files(self.size + self.most_visitors + _OTHER_FILES)
        for address in list(addresses)[:_MOST_LISTENERS]:
            with contextlib.suppress(OSError):
                listener = socket.create_server((address, 0), backlog=min(self.size + self.most_visitors, 4096))
                listener.setblocking(False)
                self._selector.register(listener, selectors.EVENT_READ)
                self._listeners.append(listener)
        return [listener.getsockname()[:2] for listener in self._listeners]

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is something to do."""
        descriptor = self._selector.fileno()  # type: ignore[attr-defined]
        assert isinstance(descriptor, int)
        return descriptor

    def sockets(self) -> list[socket.socket]:
        """Return the sockets that are open here."""
        return [*self._listeners, *self._visitors]

    def arrivals(self) -> Iterator[tuple[int, socket.socket]]:
        """Yield each rank that has just proven to be one, and its connection. Waits for nothing."""
        for key, _ in self._selector.select(0):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if connection in self._listeners:
                self._accept(connection)
            elif (rank := self._read(connection)) is not None:
                self._selector.unregister(connection)
                del self._visitors[connection]
                self._admitted.add(rank)
                yield rank, connection
        now = time.monotonic()
        for connection in [visitor for visitor, known in self._visitors.items() if now > known.deadline]:
            self._turn_away(connection)

    def close(self) -> None:
        """Listen no more, and turn away whoever has not proven anything."""
        for connection in list(self._visitors):
            self._turn_away(connection)
        for listener in self._listeners:
            self._selector.unregister(listener)
            listener.close()
        self._listeners.clear()
        self._selector.close()

    def _accept(self, listener: socket.socket) -> None:
        """Take one visitor in and challenge it; the others are reported as readable again."""
        try:
            connection, _ = listener.accept()
        except OSError:  # it has gone again
            return
        while len(self._visitors) >= self.most_visitors:
            self._turn_away(next(iter(self._visitors)))
        visitor = _Visitor(secrets.token_bytes(_NUMBER_BYTES), time.monotonic() + self.seconds_to_prove)
        self._visitors[connection] = visitor
        self._selector.register(connection, selectors.EVENT_READ)
        connection.setblocking(False)
        if not _sends(connection, visitor.number):
            self._turn_away(connection)

    def _read(self, connection: socket.socket) -> int | None:
        """Read on; returns the rank once it is proven."""
        visitor = self._visitors.get(connection)
        if visitor is None:  # turned away a moment ago, to make room
            return None
        try:
            part = connection.recv(_ANSWER.size - len(visitor.received))
        except BlockingIOError:
            return None
        except OSError:
            part = b""
        visitor.received += part
        if part and len(visitor.received) < _ANSWER.size:
            return None
        if part:
            number, rank, proof = _ANSWER.unpack(visitor.received)
            is_rank = hmac.compare_digest(proof, _proof(self.token, b"rank", visitor.number, number, rank))
            is_new = 0 < rank < self.size and rank not in self._admitted
            if is_rank and is_new and _sends(connection, _proof(self.token, b"rank 0", visitor.number, number, rank)):
                return int(rank)
        self._turn_away(connection)
        return None

    def _turn_away(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._visitors[connection]
        connection.close()


def _allow_files(number: int) -> None:
    """Let this process open so many files, where the system lets it: each rank is one of rank 0's connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def knock(address: tuple[str, int], token: bytes, rank: int, timeout_s: float = 10.0) -> socket.socket | None:
    """Connect to rank 0's door and prove to be a rank; None where nobody is there who knows the token as well."""
    connection = None
    try:
        connection = socket.create_connection(address, timeout=timeout_s)
        challenge = _receive(connection, _NUMBER_BYTES)
        number = secrets.token_bytes(_NUMBER_BYTES)
        connection.sendall(_ANSWER.pack(number, rank, _proof(token, b"rank", challenge, number, rank)))
        answer = _receive(connection, _PROOF_BYTES)
        if hmac.compare_digest(answer, _proof(token, b"rank 0", challenge, number, rank)):
            return connection
    except OSError:
        pass
    if connection is not None:
        connection.close()
    return None


def _proof(token: bytes, who: bytes, challenge: bytes, number: bytes, rank: int) -> bytes:
    return hmac.digest(token, who.ljust(8) + challenge + number + struct.pack("!I", rank), "sha256")


def _sends(connection: socket.socket, data: bytes) -> bool:
    """Send what fits into any empty buffer; returns whether it went."""
    try:
        return connection.send(data, socket.MSG_NOSIGNAL) == len(data)
    except OSError:
        return False


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    deadline = time.monotonic() + (connection.gettimeout() or 10.0)
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part or time.monotonic() > deadline:
            raise OSError("no rank is there")
        received += part
    return received
