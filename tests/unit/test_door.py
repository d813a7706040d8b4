"""The heartbeat's door: ranks come in, and an adversary that says anything else does not, whatever it sends."""

import contextlib
import random
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from patience import wait_for

from hvdtrain.world import door as module
from hvdtrain.world.door import MOST_VISITORS, Door, knock
from hvdtrain.world.interfaces import addresses_towards, own_addresses

TOKEN = b"t" * 16


class Porter(threading.Thread):
    """Serves a door until it is told to stop, as the heartbeat's thread does."""

    def __init__(self, door):
        super().__init__(daemon=True)
        self.door, self.came, self.most, self.is_over = door, {}, 0, False

    def run(self):
        while not self.is_over:
            time.sleep(0.001)
            self.came.update(self.door.arrivals())
            self.most = max(self.most, len(self.door.sockets()))


@pytest.fixture
def porter():
    door = Door(TOKEN, size=6, most_visitors=16, seconds_to_prove=2.0)
    (door.address,) = door.listen(["127.0.0.1"])
    serving = Porter(door)
    serving.start()
    yield serving
    serving.is_over = True
    serving.join()
    door.close()
    assert not door.sockets()
    for connection in serving.came.values():
        connection.close()


def come_in(porter, rank):
    """Knock as the heartbeat does: again, where others were in the way."""
    tries = (knock(porter.door.address, TOKEN, rank) for _ in range(5))
    return next((connection for connection in tries if connection), None)


def is_over(connection):
    """Return whether the other side has closed; what it had said before is read."""
    connection.settimeout(60)
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        return True
    return True


def test_ranks_come_in_and_can_talk(porter):
    connections = {rank: knock(porter.door.address, TOKEN, rank) for rank in range(1, 6)}
    assert all(connections.values())
    wait_for(lambda: len(porter.came) == 5)
    for rank, connection in connections.items():
        connection.sendall(b"here")
        porter.came[rank].settimeout(60)
        assert porter.came[rank].recv(4) == b"here"
        connection.close()


@pytest.mark.parametrize(("token", "rank"), [(b"x" * 16, 1), (TOKEN, 0), (TOKEN, 6), (TOKEN, 2**32 - 1), (b"", 1)])
def test_a_wrong_token_or_rank_is_turned_away(porter, token, rank):
    assert knock(porter.door.address, token, rank) is None
    assert not porter.came


def test_a_rank_comes_in_once(porter):
    first = knock(porter.door.address, TOKEN, 3)
    assert first is not None
    assert knock(porter.door.address, TOKEN, 3) is None
    first.close()


def test_an_answer_cannot_be_used_again(porter):
    """What somebody on the wire has seen of a rank is of no use for another connection."""
    one, other = (socket.create_connection(porter.door.address, timeout=60) for _ in range(2))
    number = b"n" * 32
    answer = module._ANSWER.pack(number, 4, module._proof(TOKEN, b"rank", one.recv(32), number, 4))
    other.sendall(answer)
    assert is_over(other)
    assert not porter.came
    one.sendall(answer)
    assert len(one.recv(32)) == 32
    wait_for(lambda: set(porter.came) == {4})  # it hears that it is in a moment before the other side's next turn
    one.close()
    other.close()


def test_somebody_else_behind_the_port_is_found_out():
    """A rank is not taken in by a program that got the port: it has no token either."""
    for says in (b"", b"x" * 32, b"x" * 10_000):
        with socket.create_server(("127.0.0.1", 0)) as server:

            def pretend(server=server, says=says):
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):  # who knocks may be gone by now
                    connection.sendall(says)
                    connection.recv(100)

            thread = threading.Thread(target=pretend)
            thread.start()
            assert knock(server.getsockname(), TOKEN, 1, timeout_s=2) is None
            thread.join()


def test_an_adversary_gets_nothing_and_takes_nothing(porter):
    """Seeded: 200 visitors say brackets, zeros, long lines, halves of an answer or nothing, and some stay."""
    draw = random.Random(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    says = [
        lambda: b"[]\n",
        lambda: b"[" * 50_000,
        lambda: b"\0" * 68,
        lambda: b'{"token": "", "end": "over", "code": 0}\n',
        lambda: draw.randbytes(draw.randrange(200)),
        lambda: draw.randbytes(67),
        lambda: b"x" * 1_000_000,
        lambda: b"",
    ]
    kept = []
    for _ in range(200):
        visitor = socket.create_connection(porter.door.address)
        visitor.settimeout(0.02)
        with contextlib.suppress(OSError):
            visitor.sendall(draw.choice(says)())
        kept.append(visitor)
        if draw.random() < 0.5:
            kept.pop(draw.randrange(len(kept))).close()
    good = come_in(porter, 1)
    assert good is not None
    good.sendall(b"x")
    assert porter.is_alive()
    wait_for(lambda: set(porter.came) == {1})
    assert porter.most <= 17  # a listener and the visitors
    wait_for(lambda: len(porter.door.sockets()) == 1)  # those that stay are shown out
    for visitor in kept:
        heard = b""
        with contextlib.suppress(ConnectionError):
            visitor.settimeout(60)
            while part := visitor.recv(4096):
                heard += part
        assert len(heard) <= 32  # the challenge, and no word of the job
        visitor.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    good.close()


def test_idle_visitors_use_up_no_descriptors(porter):
    before = len(list(Path("/proc/self/fd").iterdir()))
    visitors = [socket.create_connection(porter.door.address) for _ in range(100)]
    time.sleep(0.2)
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 100 + 17
    good = come_in(porter, 2)
    assert good is not None
    for connection in [*visitors, good]:
        connection.close()


def test_a_closed_door_listens_no_more():
    door = Door(TOKEN, size=2)
    (address,) = door.listen(["127.0.0.1"])
    waiting = socket.create_connection(address)
    list(door.arrivals())
    door.close()
    assert is_over(waiting)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(address, timeout=2)
    waiting.close()


def test_addresses_of_the_interfaces_that_lead_somewhere():
    own = own_addresses()
    assert not any(address.startswith("127.") for address in own)
    assert addresses_towards([own], own) == []  # a bridge that every host has leads nowhere
    assert set(addresses_towards([["127.0.0.2"]], own)) <= {"127.0.0.1", "127.0.0.2"}


def test_all_ranks_may_knock_at_once():
    """More of them than visitors that are let in from strangers, and none has to knock again."""
    size = 3 * MOST_VISITORS
    door = Door(b"t" * 32, size, 2 * size)
    ((_, port),) = door.listen(["127.0.0.1"])
    came = {}
    with ThreadPoolExecutor(size) as pool:
        knocks = [pool.submit(knock, ("127.0.0.1", port), b"t" * 32, rank) for rank in range(1, size)]
        deadline = time.monotonic() + 120
        while len(came) < size - 1 and time.monotonic() < deadline:
            came.update(door.arrivals())
        assert all(future.result() is not None for future in knocks)
    door.close()
    for connection in [*came.values(), *(future.result() for future in knocks)]:
        connection.close()
    assert set(came) == set(range(1, size))
