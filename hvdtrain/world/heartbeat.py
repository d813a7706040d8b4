"""The ranks watch over each other, beside Horovod and MPI: a lost, stuck or failing rank ends the job with a reason.

Horovod under Gloo waits for ever for a rank that is stuck, MPI for one that is stopped, and both answer a rank that
failed with N tracebacks about themselves. Here each rank has a thread that tells rank 0 over TCP, about once a
second, where its rank is; rank 0 tells all of them where it is itself. What can happen:

- a connection ends without a farewell: that rank is dead;
- nothing is heard of a rank for `limit_s`: its process is stopped, or its host is gone;
- no rank gets on for `limit_s`: those that are not waiting for others are stuck;
- a rank reports an exception.

Then rank 0 says so once, every rank writes the stacks of its threads to its log, and all leave with the same code.
If it is rank 0 that is missing, rank 1 speaks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hvdtrain.process.progress import Place
from hvdtrain.world.verdict import Report, judge
from hvdtrain.world.world import World

_SECONDS_FOR_WRITERS = 30.0
_SECONDS_FOR_VERDICT = 5.0
_SIOCGIFADDR = 0x8915  # Linux: the address of a network interface


@dataclass
class _Peer:
    """The other end of a connection."""

    socket: socket.socket
    name: str = ""
    rank: int = -1
    place: Place = field(default_factory=lambda: Place(None, "start", 0.0))
    heard: float = field(default_factory=time.monotonic)
    unread: bytes = b""
    has_left: bool = False

    def send(self, **message: Any) -> None:
        """Send, or drop it: a peer that does not read is found out by its silence."""
        with contextlib.suppress(OSError):
            self.socket.send(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that have come in; None: the connection is over."""
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self.unread = (self.unread + data).split(b"\n")
        self.heard = time.monotonic()
        try:
            return [json.loads(line) for line in lines]
        except ValueError:  # a stranger on our port
            return None

    def where(self) -> Place:
        """Return where it is now, or was when last heard of."""
        return self.place._replace(age_s=self.place.age_s + time.monotonic() - self.heard)


class Heartbeat:
    """Watches from `start` to `close`.

    Args:
        world: its `progress` is what is told of this rank.
        limit_s: seconds without a sign of life, or without progress, after which the job ends.
    """

    def __init__(self, world: World, limit_s: float) -> None:
        self._world = world
        self._limit_s = limit_s
        self._interval_s = min(1.0, limit_s / 10)
        self._name = f"rank {world.rank} on {socket.gethostname()}"
        self._log: Path | None = None
        self._peers: dict[socket.socket, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._token = ""
        self._is_closing = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="hvdtrain-heartbeat", daemon=True)

    def start(self) -> list[int]:
        """Connect the ranks; returns those that could not be reached, and are not watched over. Collective."""
        address = None
        if self._world.rank == 0 and self._world.size > 1:
            self._listener = socket.create_server(("", 0), backlog=self._world.size)
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)
            address = (socket.gethostname(), _addresses(), self._listener.getsockname()[1], secrets.token_hex(16))
        # The thread must answer while the others connect: it starts before they do.
        self._token = address[3] if address else ""
        if self._world.rank == 0:
            self._thread.start()
        address = self._world.broadcast_object(address, "heartbeat.address")
        is_connected = self._world.rank == 0 or self._connect(*address)
        if self._world.rank != 0:
            self._thread.start()
        return [rank for rank, ok in enumerate(self._world.all_gather_object(is_connected, "heartbeat")) if not ok]

    def log_to(self, path: Path) -> None:
        """Write stacks to the end of this file from now on."""
        self._log = path

    def close(self) -> None:
        """Say farewell: from now on this rank may go."""
        with self._lock:
            self._is_closing = True
            for peer in self._peers.values():
                peer.send(bye=True)
        self._thread.join(timeout=5 * self._interval_s)

    def fail(self, reason: str, exit_code: int = 1) -> NoReturn:
        """End the job because this rank cannot go on; `reason` is told once, by the rank that hears it first."""
        if self._world.rank != 0 and self._peers:
            for peer in self._peers.values():
                peer.send(failed=reason, code=exit_code)
            time.sleep(_SECONDS_FOR_VERDICT)  # rank 0's answer ends this process meanwhile
        self._end(reason, exit_code, is_speaker=True)

    def lose(self, reason: str) -> NoReturn:
        """End because the ranks lost contact: the rank that is to blame is heard of or missed very soon."""
        time.sleep(_SECONDS_FOR_VERDICT)
        self.fail(f"hvdtrain: {self._name}: {reason}")

    def _connect(self, host: str, addresses: list[str], port: int, token: str) -> bool:
        for address in ["127.0.0.1"] if host == socket.gethostname() else [*addresses, host]:
            with contextlib.suppress(OSError):
                connection = socket.create_connection((address, port), timeout=10)
                self._add(connection, _Peer(connection, f"rank 0 on {host}", 0))
                self._peers[connection].send(token=token, rank=self._world.rank, name=self._name)
                return True
        return False

    def _add(self, connection: socket.socket, peer: _Peer) -> None:
        connection.setblocking(False)
        self._peers[connection] = peer
        self._selector.register(connection, selectors.EVENT_READ)

    def _watch(self) -> None:
        """Send and receive signs of life until the end. Runs in its own thread."""
        last_beat, judge_from = 0.0, 0.0
        while not self._is_closing:
            ready = self._selector.select(self._interval_s)
            now = time.monotonic()
            if last_beat and now - last_beat > 5 * self._interval_s + 1:
                judge_from = now + self._limit_s  # this process was stopped itself: what it missed proves nothing
            for key, _ in ready:
                self._hear(key.fileobj)
            if now - last_beat >= self._interval_s:
                last_beat = now
                place = self._world.progress.read()
                for peer in list(self._peers.values()):
                    peer.send(place=place)
            if now >= judge_from and (verdict := self._judge()):
                self._end(f"hvdtrain: {verdict}", 1, self._is_first())

    def _hear(self, connection: Any) -> None:
        if self._listener is not None and connection is self._listener:
            with contextlib.suppress(OSError):
                accepted = self._listener.accept()[0]
                self._add(accepted, _Peer(accepted))
            return
        peer = self._peers[connection]
        messages = peer.receive()
        if messages is None:
            self._selector.unregister(connection)
            del self._peers[connection]
            connection.close()
            if not peer.has_left and peer.name and not self._is_closing:
                self._end(
                    f"hvdtrain: {peer.name} is gone, killed or crashed: it was last seen at {peer.place}",
                    1,
                    self._is_first(),
                )
        for message in messages or []:
            self._take(peer, message)

    def _take(self, peer: _Peer, message: dict[str, Any]) -> None:
        if not peer.name:
            if message.get("token") == self._token:
                peer.name, peer.rank = message["name"], message["rank"]
        elif "place" in message:
            peer.place = Place(*message["place"])
        elif "bye" in message:
            peer.has_left = True
        elif "failed" in message:
            self._end(message["failed"], message["code"], is_speaker=True)
        elif "end" in message:
            self._end(message["end"], message["code"], is_speaker=False)

    def _is_first(self) -> bool:
        """Return whether it is this rank that speaks: rank 0, and if that is missing rank 1."""
        return self._world.rank == min(1, self._world.size - 1) or self._world.rank == 0

    def _judge(self) -> str | None:
        """Return what is wrong with the ranks that this one is told of, or None."""
        now = time.monotonic()
        peers = [
            Report(peer.name, peer.where(), now - peer.heard)
            for peer in self._peers.values()
            if peer.name and not peer.has_left
        ]
        # Rank 0 alone is told by all: only it can say that no rank makes progress.
        here = Report(self._name, self._world.progress.read(), 0.0) if self._world.rank == 0 else None
        return judge(peers, here, self._limit_s)

    def _end(self, reason: str, exit_code: int, is_speaker: bool) -> NoReturn:
        """Leave together with the others. Never returns; a second thread that comes here waits for the first."""
        self._lock.acquire()
        if self._is_closing:
            sys.exit()  # ends this thread: the others have said farewell
        if is_speaker:
            sys.stdout.flush()
            sys.stderr.write(reason.rstrip() + "\n")
            sys.stderr.flush()
        self._write_stacks(reason)
        _wait_for_writers()
        for peer in list(self._peers.values()):
            peer.send(end=reason, code=exit_code)
        time.sleep(0.2)  # let the message pass before the launcher sees this process end
        os._exit(exit_code)

    def _write_stacks(self, reason: str) -> None:
        if self._log is None:
            return
        with contextlib.suppress(OSError), self._log.open("a") as file:
            file.write(f"{reason.rstrip()}\nat {self._world.progress.read()}; the stacks of all threads:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def _wait_for_writers() -> None:
    """Wait, not for ever, for a checkpoint that a thread is writing."""
    deadline = time.monotonic() + _SECONDS_FOR_WRITERS
    for thread in threading.enumerate():
        if thread.name == "hvdtrain-save" and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


def _addresses() -> list[str]:
    """Return the IPv4 addresses of this host's interfaces: its name may stand for a loopback address (Debian)."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface[:15].encode()))
                found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in found if not address.startswith("127.")]
