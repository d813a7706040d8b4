"""Work is told from waiting by processor time."""

import os
import threading
import time

from hvdtrain.process.busy import BusyClock


def seen_from_another_thread(clock):
    found = []
    thread = threading.Thread(target=lambda: found.append(clock.is_working()))
    thread.start()
    thread.join()
    return found[0]


def spin(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_sleep_is_no_work_and_counting_is():
    is_over = threading.Event()
    before = threading.Thread(target=lambda: [spin(0.01) for _ in iter(is_over.is_set, True)], daemon=True)
    before.start()  # as Horovod's thread, which was there before
    clock = BusyClock()
    clock.start()
    time.sleep(0.5)
    assert not seen_from_another_thread(clock)
    is_over.set()  # or it takes half of what a busy machine leaves this process
    before.join()
    spin(0.3)
    assert seen_from_another_thread(clock)
    later = threading.Thread(target=spin, args=(1.0,), daemon=True)
    later.start()  # as a tokenizer's
    time.sleep(0.5)
    assert seen_from_another_thread(clock)
    later.join()


def test_a_slow_download_is_work(tmp_path):
    clock = BusyClock()
    clock.start()
    with (tmp_path / "file").open("wb", buffering=0) as file:
        for _ in range(10):
            file.write(bytes(100_000))
            time.sleep(0.05)
    assert seen_from_another_thread(clock)
    time.sleep(0.5)
    assert not seen_from_another_thread(clock)


def test_what_waiting_threads_tell_each_other_is_no_work():
    """As Gloo's do, a thousand times a second: more than 100 kB/s in all."""
    is_over, is_heard, may_talk = threading.Event(), threading.Event(), threading.Event()
    reader, writer = os.pipe()
    may_talk.set()

    def chat():
        while not is_over.is_set():
            if not may_talk.is_set():
                is_heard.set()
                may_talk.wait()
                continue
            os.write(writer, bytes(1000))
            os.read(reader, 1000)
            time.sleep(0.001)

    before = threading.Thread(target=chat, daemon=True)
    before.start()
    clock = BusyClock()
    clock.start()
    time.sleep(0.5)
    may_talk.clear()  # or what it says between the look and its end counts against a tenth of a second
    is_heard.wait()
    assert not seen_from_another_thread(clock)
    is_over.set()
    may_talk.set()
    before.join()
    time.sleep(0.1)
    assert not seen_from_another_thread(clock)
    os.close(reader)
    os.close(writer)
