"""The bar in a real pseudo-terminal: one line, in windows of any width, that change while it is drawn."""

import fcntl
import io
import os
import pty
import struct
import termios

import pytest

from hvdtrain.rundir.sinks import Console

METRICS = {"train/epoch": 0.5, "train/loss": 1.25, "train/lr": 1e-3, "throughput/tokens_per_s": 12345.6}


class Screen:
    """As much of a terminal as shows what a person sees. What a narrower window cuts off is gone, as in xterm."""

    def __init__(self, columns):
        self.columns, self.rows, self.row, self.column = columns, [""], 0, 0

    def resize(self, columns):
        self.columns, self.column = columns, min(self.column, columns - 1)
        self.rows = [row[:columns] for row in self.rows]

    def feed(self, text):
        for character in text:
            if character == "\r":
                self.column = 0
            elif character == "\n":
                self.go_down()
            else:
                if self.column == self.columns:
                    self.go_down()
                    self.column = 0
                row = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = row[: self.column] + character + row[self.column + 1 :]
                self.column += 1

    def go_down(self):
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")

    @property
    def shown(self):
        return [row.rstrip() for row in self.rows if row.strip()]


def draw(widths, say=None):
    """Draw a bar in a window of each of these widths, one after the other; yields what is shown after each."""
    master, slave = pty.openpty()
    screen, lines = Screen(widths[0]), []

    def show():
        """Feed the screen with all that was written: what comes last is a NUL, which shows nothing."""
        os.write(slave, b"\0")
        text = b""
        while not text.endswith(b"\0"):
            text += os.read(master, 1 << 16)
        screen.feed(text.decode().rstrip("\0"))

    def resize(columns):
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        screen.resize(columns or 80)

    with os.fdopen(slave, "w") as stream:
        console = Console(is_terminal=True, stream=stream)
        resize(widths[0])
        console.begin(0, 1000)
        for step, columns in enumerate(widths, 1):
            resize(columns)  # while the last bar is there
            console.write(step, METRICS, None)
            if say:
                console.say(f"line {step}")
                lines.append(f"line {step}")
                console.write(step, METRICS, None)
            show()
            yield step, columns, lines, screen.shown
        console.close()
        show()
        assert screen.shown == lines
    os.close(master)


@pytest.mark.parametrize("say", [False, True], ids=["bar alone", "lines between"])
def test_one_line_while_the_window_changes(say):
    widths = [80, 20, 200, 30, 120, 21, 79, 8, 200, 50, 49, 20]
    for step, columns, lines, (*above, bar) in draw(widths, say):
        assert above == lines, columns
        assert len(bar) <= columns
        assert columns < 20 or f"{step}/1000" in bar


def test_every_width():
    """How far it is, at 20 columns; the loss from 40 on; times and speed where there is room."""
    for step, columns, _, shown in draw([*range(20, 201)]):
        (bar,) = shown
        assert len(bar) <= columns
        assert f"{step}/1000" in bar
        assert columns < 40 or "loss 1.25" in bar
        assert columns < 110 or ("12,346 tokens/s" in bar and "<" in bar)


def test_a_window_that_does_not_say_its_width(monkeypatch):
    """As those of many containers: 0 columns are 80, or what COLUMNS says."""
    monkeypatch.delenv("COLUMNS", raising=False)
    assert [len(shown[0]) <= 80 for *_, shown in draw([0, 0])] == [True, True]
    monkeypatch.setenv("COLUMNS", "30")
    stream = io.StringIO()
    Console(is_terminal=True, stream=stream).begin(0, 100)
    assert max(map(len, stream.getvalue().split("\r"))) <= 30
