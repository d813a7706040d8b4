"""The fixture that fails a test which leaves something behind does so, and names it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
LEAKS = {
    "nothing": ("pass", None),
    "a thread that ends soon": ("threading.Timer(0.1, str).start()", None),
    "variable": ("os.environ['LEFT'] = 'here'", "variable LEFT='here'"),
    "file": ("pathlib.Path('left.txt').touch()", "file .*left.txt"),
    "directory": ("os.chdir('/')", "working directory /"),
    "thread": ("threading.Thread(target=time.sleep, args=(8,), name='left').start()", "thread left"),
    "process": ("left.append(subprocess.Popen(['sleep', '8']))", r"process \d+ \(sleep 8\)"),
}


@pytest.mark.slow
def test_what_is_left_behind_fails_the_test(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text().replace("SECONDS_TO_END = 30", "SECONDS_TO_END = 2"))
    tests = "\n".join(f"def test_{i}(): {code}" for i, (code, _) in enumerate(LEAKS.values()))
    (tmp_path / "test_it.py").write_text(f"import os, pathlib, subprocess, threading, time\nleft = []\n{tests}\n")
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "-rE", "test_it.py"]
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120)
    reports = re.findall(
        r"ERROR at teardown of test_(\d) [\s\S]*?\nE +Failed: this test leaves behind: (.*)", done.stdout
    )
    expected = [(str(i), says) for i, (_, says) in enumerate(LEAKS.values()) if says]
    assert [i for i, _ in reports] == [i for i, _ in expected], done.stdout
    for (_, left), (_, says) in zip(reports, expected, strict=True):
        assert re.fullmatch(says, left)
