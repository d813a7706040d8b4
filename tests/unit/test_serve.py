"""`report --serve` without a browser: whom it answers, what with, and when it draws anew."""

import http.client
import threading
import time

import pytest
from made_runs import make_run

from hvdtrain.cli import parse
from hvdtrain.errors import ConfigError
from hvdtrain.verbs.report import serve
from hvdtrain.verbs.report.runs import read_runs
from hvdtrain.verbs.report.serve import LivePage, LiveServer
from hvdtrain.verbs.report.shell import bokeh_source

pytest.importorskip("bokeh")


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "_SHARE", 100.0)  # of a core, that drawing may take: it draws at once
    folder = make_run(tmp_path / "run", lines=30)
    page = LivePage(lambda: (read_runs([folder]), ""), [folder], bokeh_source())
    with LiveServer(page, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield folder, server
        server.shutdown()
        thread.join()


def ask(server, path, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, answer.headers


def version_of(page):
    return page.split("data-version='")[1].split("'")[0]


def test_it_serves_a_page_and_what_is_new_of_it(served):
    folder, server = served
    status, page, headers = ask(server, "/")
    assert (status, headers["Cache-Control"]) == (200, "no-store")
    assert "connect-src 'self'" in page
    assert len(page) > 400_000
    seen = version_of(page)
    assert ask(server, f"/now?seen={seen}")[:2] == (204, "")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 310, "train/loss": 0.125}\n')
    deadline = time.monotonic() + 60
    while (answer := ask(server, f"/now?seen={seen}"))[0] == 204:  # it draws a share of the time only
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert answer[0] == 200
    assert "0.125 at step 310" in answer[1]
    assert len(answer[1]) < 200_000
    assert version_of(answer[1]) != seen
    assert "0.125 at step 310" in ask(server, "/")[1]


def test_it_answers_to_its_own_address_alone(served):
    """A page of another site, whose name was made to lead here, learns nothing."""
    _, server = served
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "/", host="example.com")[:2] == (403, "this server answers to its own address alone")
    assert ask(server, "/", host=f"127.0.0.1.example.com:{server.server_port}")[0] == 403
    assert ask(server, "/", host="localhost:1234")[0] == 200  # through a tunnel
    assert ask(server, "/../etc/passwd")[0] == 404
    assert ask(server, "/favicon.ico")[0] == 404
    assert ask(server, "/", method="POST")[0] == 501


def test_a_run_that_is_taken_away_is_said(served, capfd):
    folder, server = served
    folder.rename(folder.with_name("elsewhere"))
    deadline = time.monotonic() + 60
    while (answer := ask(server, "/now"))[0] == 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert answer[0] == 503
    assert "is no directory" in answer[1]
    assert capfd.readouterr().err == ""


def test_a_port_that_is_taken_is_refused(served):
    folder, server = served
    with pytest.raises(ConfigError, match="cannot be had"):
        parse(["report", str(folder), "--serve", str(server.server_port)]).run()


@pytest.mark.parametrize(("words", "value"), [([], False), (["--serve"], True), (["--serve", "8000"], 8000)])
def test_words(tmp_path, words, value):
    assert parse(["report", str(make_run(tmp_path / "run")), *words]).options.serve is value or value == 8000
    assert parse(["report", str(tmp_path / "run"), *words]).options.serve == value


@pytest.mark.parametrize("words", [["--serve", "x"], ["--serve", "65536"], ["--serve", "--output", "x.html"]])
def test_what_is_no_port_is_refused(tmp_path, words):
    with pytest.raises(ConfigError):
        parse(["report", str(make_run(tmp_path / "run")), *words])
