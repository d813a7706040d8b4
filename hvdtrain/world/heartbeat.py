"""The ranks watch over each other, beside Horovod and MPI: a lost, stuck or failing rank ends the job with a reason.

Horovod under Gloo waits for ever for a rank that is stuck, MPI for one that is stopped, and both answer a rank that
failed with N tracebacks about themselves. Here each rank has a thread that reports to rank 0 over TCP where its rank
is; rank 0 reports to all of them where it is itself. That is once a second, and less often with more than 128
ranks, so that rank 0 has no more to read than with as many: whoever has stopped is missed after minutes all the same,
and a connection that ends is noticed at once. What can happen:

- a connection ends without a farewell: that rank is dead;
- a rank does not report for `limit_s`: its process is stopped, or its host is gone;
- no rank makes progress for `limit_s`: those that are not waiting for others are stuck;
- a rank reports an exception.

Then rank 0 says so once, every rank writes the stacks of its threads to its log, and all leave with the same code.
If it is rank 0 that is missing, rank 1 speaks. Who may connect is decided in `door.py`, who is dead or stuck in
`verdict.py`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
import weakref
from pathlib import Path
from typing import Any, NoReturn

from hvdtrain.process.busy import BusyClock
from hvdtrain.process.progress import Place
from hvdtrain.world.door import MOST_VISITORS, Door, knock
from hvdtrain.world.interfaces import addresses_towards, own_addresses
from hvdtrain.world.peer import Peer
from hvdtrain.world.verdict import Report, judge
from hvdtrain.world.world import World

_SECONDS_FOR_WRITERS = 30.0
_SECONDS_FOR_VERDICT = 5.0
# Whatever is slow when a rank leaves, such as a terminal or a disk that does not answer: then it leaves without it.
_SECONDS_TO_LEAVE = _SECONDS_FOR_WRITERS + 15.0
_TOKEN_BYTES = 32
_LONGEST_REASON = 32_000
_KNOCKS = 3
_REPORTS_PER_S = 128


class Heartbeat:
    """Watches from `start` to `close`.

    Args:
        world: its `progress` is what is reported of this rank.
        limit_s: seconds without a report, or without progress, after which the job ends.
    """

    def __init__(self, world: World, limit_s: float) -> None:
        self._world = world
        self._limit_s = limit_s
        # Rank 0 is told of all ranks: that many a second, however many there are.
        self._interval_s = min(max(1.0, world.size / _REPORTS_PER_S), limit_s / 10)
        self._name = f"rank {world.rank} on {socket.gethostname()}"
        self._hosts: list[str] = []
        self._log: Path | None = None
        self._peers: dict[socket.socket, Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakeful = socket.socketpair()
        self._door: Door | None = None
        self._are_all_in = False
        self._is_closing = False
        self._lock = threading.Lock()
        self._busy = BusyClock()
        self._thread = threading.Thread(target=self._run, name="hvdtrain-heartbeat", daemon=True)

    def start(self) -> list[int]:
        """Connect the ranks; returns those that could not be reached, and are not watched over. Collective."""
        # Children of this process, such as loaders of data, must not keep its connections open after its death.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(reference()))
        self._busy.start()
        world = self._world
        everyone = world.all_gather_object((socket.gethostname(), own_addresses()), "heartbeat.hosts")
        self._hosts = [host for host, _ in everyone]
        invitation = self._open_door(everyone) if world.rank == 0 and world.size > 1 else None
        if world.rank == 0:  # its thread must answer while the others connect
            self._thread.start()
        invitation = world.broadcast_object(invitation, "heartbeat.address")
        is_connected = world.rank == 0 or (invitation is not None and self._connect(*invitation))
        if world.rank != 0:
            self._thread.start()
        connected = world.all_gather_object(is_connected, "heartbeat")
        self._are_all_in = True
        return [rank for rank, ok in enumerate(connected) if not ok]

    def log_to(self, path: Path) -> None:
        """Write stacks to the end of this file from now on."""
        self._log = path

    def close(self) -> None:
        """Say farewell: from now on this rank may go."""
        with self._lock:
            self._is_closing = True
            for peer in list(self._peers.values()):
                peer.send(bye=True)
        self._waker.close()  # the thread is told: it waits at the other end
        self._thread.join(timeout=5 * self._interval_s)

    def fail(self, reason: str, exit_code: int = 1) -> NoReturn:
        """End the job because this rank cannot go on; `reason` is said once, by the first rank that knows it."""
        if self._world.rank != 0 and self._peers:
            for peer in self._peers.values():
                peer.send(failed=reason[:_LONGEST_REASON], code=exit_code)
            time.sleep(_SECONDS_FOR_VERDICT)  # rank 0's answer ends this process meanwhile
        self._end(reason, exit_code, is_speaker=True)

    def lose(self, reason: str) -> NoReturn:
        """End because the ranks lost contact: the rank that is to blame reports, or is missed, very soon."""
        time.sleep(_SECONDS_FOR_VERDICT)
        self.fail(f"hvdtrain: {self._name}: {reason}")

    def _open_door(self, everyone: list[tuple[str, list[str]]]) -> tuple[list[tuple[str, int]], bytes]:
        """Listen where the other ranks come from; returns the addresses and the job's token."""
        here = socket.gethostname()
        addresses = ["127.0.0.1"] if self._hosts.count(here) > 1 else []
        others = {host: tuple(found) for host, found in everyone if host != here}
        if others:
            # Where nothing is known of the way to them, it is every interface.
            addresses += addresses_towards(others.values(), own_addresses()) or [""]
        # All ranks may knock at once; who is turned away for others must knock again.
        self._door = Door(secrets.token_bytes(_TOKEN_BYTES), self._world.size, max(MOST_VISITORS, 2 * self._world.size))
        listening = self._door.listen(addresses)
        self._selector.register(self._door, selectors.EVENT_READ)
        hosts = [(own_addresses() or [here]) if address == "0.0.0.0" else [address] for address, _ in listening]
        reachable = [(host, port) for found, (_, port) in zip(hosts, listening, strict=True) for host in found]
        return reachable, self._door.token

    def _connect(self, addresses: list[tuple[str, int]], token: bytes) -> bool:
        for address in addresses * _KNOCKS:
            connection = knock(address, token, self._world.rank)
            if connection is not None:
                self._add(connection, Peer(connection, f"rank 0 on {self._hosts[0]}"))
                return True
        return False

    def _add(self, connection: socket.socket, peer: Peer) -> None:
        connection.setblocking(False)
        self._peers[connection] = peer
        self._selector.register(connection, selectors.EVENT_READ)

    def _run(self) -> None:
        """Watch; what fails in here is reported as what it is, not as a rank that is lost. Runs in its own thread."""
        try:
            self._watch()
        except Exception:
            self._end(f"hvdtrain: {self._name}: watching over the ranks failed\n{traceback.format_exc()}", 1, True)

    def _watch(self) -> None:
        """Send and receive reports until the end."""
        self._selector.register(self._wakeful, selectors.EVENT_READ)
        last_beat, judge_from = 0.0, 0.0
        while not self._is_closing:
            ready = self._selector.select(self._interval_s)
            now = time.monotonic()
            if last_beat and now - last_beat > 5 * self._interval_s + 1:
                judge_from = now + self._limit_s  # this process was stopped itself: what it missed proves nothing
            self._admit()
            for key, _ in ready:
                if key.fileobj in self._peers:
                    self._read(self._peers[key.fileobj])
            if now - last_beat >= self._interval_s:
                last_beat = now
                self._beat()
                # Not whenever a report comes in: it looks at every rank.
                if now >= judge_from and (verdict := self._judge()):
                    self._end(f"hvdtrain: {verdict}", 1, self._is_first())
        self._wakeful.close()

    def _admit(self) -> None:
        """Let ranks in; when all have come, nobody may come any more."""
        if self._door is None:
            return
        for rank, connection in self._door.arrivals():
            self._add(connection, Peer(connection, f"rank {rank} on {self._hosts[rank]}"))
        if self._are_all_in:
            self._selector.unregister(self._door)
            self._door.close()
            self._door = None

    def _beat(self) -> None:
        place = self._world.progress.read()
        # Before and after training no step tells of progress, but the work of this process does.
        if place.step is None and self._busy.is_working() and place.phase != "communication":
            self._world.progress.note_work()
            place = self._world.progress.read()
        for peer in list(self._peers.values()):
            peer.send(place=place)

    def _read(self, peer: Peer) -> None:
        messages = peer.receive()
        if messages is None:
            self._selector.unregister(peer.socket)
            del self._peers[peer.socket]
            peer.socket.close()
            if not peer.has_left and not self._is_closing:
                self._end(
                    f"hvdtrain: {peer.name} is gone, killed or crashed: it was last seen at {peer.place}",
                    1,
                    self._is_first(),
                )
        for message in messages or []:
            self._take(peer, message)

    def _take(self, peer: Peer, message: dict[str, Any]) -> None:
        if "place" in message:
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
        """Return what is wrong with the ranks that report here, or None."""
        now = time.monotonic()
        others = [
            Report(peer.name, peer.where(), now - peer.heard) for peer in self._peers.values() if not peer.has_left
        ]
        # All report to rank 0 alone: only it can say that no rank makes progress.
        here = Report(self._name, self._world.progress.read(), 0.0) if self._world.rank == 0 else None
        return judge(others, here, self._limit_s)

    def _end(self, reason: str, exit_code: int, is_speaker: bool) -> NoReturn:
        """Leave together with the others. Never returns; a second thread that comes here waits for the first.

        Saying why is no condition of leaving: a pipe whose reader is gone or does not read holds nobody.
        """
        self._lock.acquire()
        if self._is_closing:
            sys.exit()  # ends this thread: the others have said farewell
        last = threading.Timer(_SECONDS_TO_LEAVE, os._exit, (exit_code,))
        last.daemon = True
        try:
            last.start()
            if is_speaker:
                _say(reason)
            self._write_stacks(reason)
            _wait_for_writers()
            for peer in list(self._peers.values()):
                peer.send(end=reason[:_LONGEST_REASON], code=exit_code)
            time.sleep(0.2)  # let the message pass before the launcher sees this process end
        finally:
            os._exit(exit_code)

    def _write_stacks(self, reason: str) -> None:
        if self._log is None:
            return
        with contextlib.suppress(OSError, ValueError), self._log.open("a", encoding="utf-8") as file:
            file.write(f"{reason.rstrip()}\nat {self._world.progress.read()}; the stacks of all threads:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _sockets(self) -> list[socket.socket]:
        return [self._waker, self._wakeful, *self._peers, *(self._door.sockets() if self._door else [])]


def _say(reason: str) -> None:
    for write in (sys.stdout.flush, lambda: sys.stderr.write(f"{reason.rstrip()}\n"), sys.stderr.flush):
        with contextlib.suppress(OSError, ValueError):  # a pipe without a reader, or a stream that was closed
            write()


def _forget(heartbeat: Heartbeat | None) -> None:
    """Close a parent's connections in its child, and only there: what the parent's selector watches stays watched."""
    for connection in heartbeat._sockets() if heartbeat else []:
        with contextlib.suppress(OSError):
            os.close(connection.detach())


def _wait_for_writers() -> None:
    """Wait, not for ever, for a checkpoint that a thread is writing."""
    deadline = time.monotonic() + _SECONDS_FOR_WRITERS
    for thread in threading.enumerate():
        if thread.name == "hvdtrain-save" and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
