"""The page of `report` in a real browser: it draws, says nothing, fetches nothing, and does what is asked of it."""

import html
import json
import re
import threading

import pytest
from browser import visit, why_no_browser
from made_runs import make_run

from hvdtrain.cli import parse
from hvdtrain.verbs.report.runs import read_runs
from hvdtrain.verbs.report.serve import LivePage, LiveServer
from hvdtrain.verbs.report.shell import bokeh_source

bokeh = pytest.importorskip("bokeh")

# Does what a reader does, and writes down what the page then is.
READER = """
<script>
(async () => {
  while (!document.documentElement.dataset.ready) await new Promise((done) => setTimeout(done, 50));
  const quiet = () => new Promise((done) => setTimeout(done, 300));
  const figures = Bokeh.documents.map((document) => document.roots()[0]);
  const first = figures[0];
  const look = () => ({x: first.renderers[0].glyph.x.field, label: first.below[0].axis_label,
    end: first.x_range.end, top: first.y_range.end, shown: first.renderers.map((one) => one.visible)});
  const press = async (query) => { document.querySelector(query)?.click(); await quiet(); return look(); };
  await quiet();
  const found = {charts: figures.length, before: look()};
  const shown = document.documentElement.clientWidth;
  found.width = [innerWidth, shown, document.documentElement.scrollWidth];
  found.out = [...document.querySelectorAll("body *")].filter((one) => !one.closest(".scroll table, .plot")
    && one.getBoundingClientRect().right > shown + 1).map((one) => one.outerHTML.slice(0, 80)).slice(0, 3);
  found.units = await press("input[value=units]");
  found.seconds = await press("input[value=seconds]");
  found.steps = await press("input[value=step]");
  found.usual = await press("input[name=usual]");
  found.all = await press("input[name=usual]");
  found.hidden = await press("input[name=run][value='1']");
  const column = () => [...document.querySelectorAll("table")].find((one) => one.querySelector("th button"))
    .querySelectorAll("tbody td:first-child");
  const names = () => [...column()].map((cell) => cell.textContent);
  const heads = [...document.querySelectorAll("th button")];
  const head = heads.find((button) => button.textContent.startsWith("training loss"));
  head.click(); found.up = names(); head.click(); found.down = names();
  found.unnamed = [...document.querySelectorAll("button, input, summary, figure, [role=region]")].filter((one) =>
    !(one.textContent.trim() || one.labels?.length || one.getAttribute("aria-label"))).length;
  const report = document.createElement("pre");
  report.id = "found";
  report.textContent = JSON.stringify(found);
  document.body.append(report);
})();
</script>
"""


@pytest.fixture(scope="module", autouse=True)
def chromium():
    reason = why_no_browser()
    if reason:
        pytest.skip(reason)


def written(folders, page):
    assert parse(["report", *map(str, folders), "--output", str(page)]).run() == 0
    return page


def read(page, folder, width=1280, is_dark=False, screenshot=None):
    (folder / "read.html").write_text(page.read_text().replace("</body>", f"{READER}</body>"))
    seen = visit(folder / "read.html", folder, width, is_dark=is_dark, screenshot=screenshot)
    assert seen.console == []
    found = re.search(r'<pre id="found">(.*?)</pre>', seen.dom, re.DOTALL)
    assert found, seen.dom[-500:]
    return json.loads(html.unescape(found[1])), seen


def test_three_runs_side_by_side(tmp_path):
    folders = [
        make_run(tmp_path / name, lines=500, seed=i, spike_at=250 if i == 1 else None) for i, name in enumerate("abc")
    ]
    found, seen = read(written(folders, tmp_path / "page.html"), tmp_path)
    assert found["charts"] == seen.dom.count("<figure") == 6
    assert [found[name]["x"] for name in ("before", "units", "seconds", "steps")] == [
        "step",
        "units",
        "seconds",
        "step",
    ]
    assert found["before"]["end"] == pytest.approx(5000, rel=0.1)
    assert found["units"]["end"] == pytest.approx(5000 * 2048, rel=0.1)
    assert found["seconds"]["end"] == pytest.approx(5000 * 0.105, rel=0.1)
    assert found["steps"]["end"] == pytest.approx(5000, rel=0.1)
    assert "tokens" in found["units"]["label"]
    assert found["before"]["top"] > 1000
    assert found["usual"]["top"] < 10
    assert found["all"]["top"] > 1000
    assert all(found["before"]["shown"])
    assert not all(found["hidden"]["shown"])
    assert any(found["hidden"]["shown"])
    assert sorted(found["up"]) == ["a", "b", "c"]
    assert found["down"] == found["up"][::-1]
    assert found["unnamed"] == 0


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(tmp_path, is_dark):
    """The figures of what a screen shows are those of 390 pixels; the picture is not one colour."""
    page = written([make_run(tmp_path / "a", lines=300, ranks=16, slow_rank=3)], tmp_path / "page.html")
    picture = tmp_path / "picture.png"
    found, seen = read(page, tmp_path, width=390, is_dark=is_dark, screenshot=picture)
    assert found["width"] == [390, 390, 390]
    assert found["out"] == []
    assert found["charts"] == seen.dom.count("<figure") == 8
    assert (found["before"]["x"], found["units"]["x"]) == ("step", "units")
    from PIL import Image

    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    background = max(colours)[1]
    assert background == ((0, 0, 0) if is_dark else (255, 255, 255))
    assert len(colours) > 50


def test_nothing_leaves_the_page_whatever_a_run_is_called(tmp_path):
    """Formulas make BokehJS fetch MathJax, pictures in a text would be fetched: here they are text."""
    evil = "<img src=http://example.com/a.png>$$x^2$$ @{y} \\[x\\]"
    folder = make_run(tmp_path / "$$x$$", lines=100, extra=[evil])
    with (folder / "logs" / "rank-000.log").open("a") as file:
        file.write(f"2026-11-20 10:00:03,100 INFO warning: {evil} at step 500\n")
    page = written([folder, make_run(tmp_path / "b", extra=[f"grad_norm/{evil}"])], tmp_path / "page.html")
    _, seen = read(page, tmp_path)
    assert [address for address in seen.asked_for if "example.com" in address or "mathjax" in address.lower()] == []
    assert "http" not in re.sub(r"<script type=.text/plain.*?</script>", "", page.read_text(), flags=re.DOTALL).replace(
        "http://example.com/a.png", ""
    ).replace("http-equiv", "")


def test_the_browser_would_tell_of_a_request(tmp_path):
    """The test above can fail: a page that asks for something is seen to ask."""
    page = tmp_path / "page.html"
    page.write_text("<img src='http://127.0.0.1:9/a.png'><script>console.error('seen')</script>")
    seen = visit(page, tmp_path)
    assert any("127.0.0.1:9" in address for address in seen.asked_for)
    assert any("seen" in line for line in seen.console)


def test_nothing_logged_yet_is_a_page_too(tmp_path):
    folder = make_run(tmp_path / "a", lines=1)
    (folder / "metrics.jsonl").write_text("")
    seen = visit(written([folder], tmp_path / "page.html"), tmp_path)
    assert seen.console == []
    assert "No metrics have been logged" in seen.dom


# Looks closer at a part of the first chart, opens a table, waits for new lines, and says what has become of it all.
ZOOMER = """
<script>
(async () => {
  const pause = () => new Promise((done) => setTimeout(done, 100));
  while (!document.documentElement.dataset.ready) await pause();
  const figure = Bokeh.documents[0].roots()[0];
  const look = () => ({start: figure.x_range.start, end: figure.x_range.end,
    caption: document.querySelector("figcaption").textContent, axis: figure.below[0].axis_label,
    last: figure.renderers[0].data_source.data.step.at(-1), open: document.querySelector("details").open,
    details: document.querySelectorAll("details").length, live: document.getElementById("live").textContent});
  document.querySelector("input[value=seconds]").click();
  await pause(); await pause();
  figure.x_range.have_updated_interactively = true;
  figure.x_range.setv({start: 7, end: 9});
  document.querySelector("details").open = true;
  const found = {before: look()};
  for (let i = 0; i < 400 && !document.documentElement.dataset.version; i++) await pause();
  await pause();
  found.after = look();
  const head = [...document.querySelectorAll("th button")].at(0);
  head.click();
  found.sorted = head.parentNode.getAttribute("aria-sort");
  const report = document.createElement("pre");
  report.id = "found";
  report.textContent = JSON.stringify(found);
  document.body.append(report);
})();
</script>
"""


class Growing(LivePage):
    """Has a reader in it, and another line in its run once a browser asks what is new."""

    def whole(self):
        before, end, after = super().whole().rpartition("</body>")
        return f"{before}{ZOOMER}{end}{after}"

    def since(self, version):
        metrics = self._paths[0] / "metrics.jsonl"
        if "8888" not in metrics.read_text():
            with metrics.open("a") as file:
                file.write('{"step": 8888, "train/loss": 0.125, "time/step_s": 0.1}\n')
            with (self._paths[0] / "logs" / "rank-000.log").open("a") as file:
                file.write("2026-11-20 11:00:00,100 INFO warning: one more\n")
            self._is_drawable_at = 0.0
        return super().since(version)


def test_a_live_page_follows_the_run_and_keeps_what_a_reader_looks_at(tmp_path):
    folder = make_run(tmp_path / "run", lines=100)
    page = Growing(lambda: (read_runs([folder]), ""), [folder], bokeh_source())
    with LiveServer(page, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            seen = visit(server.address, tmp_path)
        finally:
            server.shutdown()
            thread.join()
    found = re.search(r'<pre id="found">(.*?)</pre>', seen.dom, re.DOTALL)
    assert found, (seen.dom[-500:], seen.console)
    before, after = (json.loads(html.unescape(found[1]))[key] for key in ("before", "after"))
    assert (before["last"], after["last"]) == (1000, 8888)
    assert (after["start"], after["end"], after["axis"]) == (7, 9, before["axis"])
    assert "time in training" in after["axis"]
    assert "0.125 at step 8,888" in after["caption"]
    assert before["open"] is after["open"] is True
    assert "2 warnings" in seen.dom
    assert after["details"] == before["details"]
    assert "Live: follows the run" in after["live"]
    assert json.loads(html.unescape(found[1]))["sorted"] == "ascending"
    assert [line for line in seen.console if "favicon" not in line] == []  # nothing was refused, either


PLAN = """
(() => {
  const wide = document.documentElement;
  const look = (one) => ({box: one.getBoundingClientRect().right, text: one.textContent.slice(0, 40)});
  return {width: [innerWidth, wide.clientWidth, wide.scrollWidth], charts: Bokeh.documents.length,
    out: [...document.querySelectorAll("body *")].filter((one) => !one.closest(".scroll table, .plot")).map(look)
      .filter((one) => one.box > wide.clientWidth + 1).slice(0, 3),
    dark: matchMedia("(prefers-color-scheme: dark)").matches, back: getComputedStyle(document.body).backgroundColor};
})()
"""


@pytest.mark.parametrize(("width", "is_dark"), [(390, True), (390, False), (1280, False)])
def test_a_plan_is_a_page_like_a_report(tmp_path, width, is_dark):
    """On a phone nothing scrolls sideways but the table in its frame; nothing is said, nothing is fetched."""
    from hvdtrain.verbs.plan.page import page_of

    page = tmp_path / "plan.html"
    page.write_text(page_of(made_plan(), bokeh_source()))
    seen = visit(page, tmp_path, width, is_dark=is_dark, expression=PLAN)
    assert seen.console == []
    assert [address for address in seen.asked_for if not address.startswith(("file:", "data:", "blob:"))] == []
    found = seen.found
    assert found["charts"] == seen.dom.count("<figure") == 3
    assert found["width"] == [width] * 3
    assert found["out"] == []
    assert found["dark"] is is_dark
    assert found["back"] == ("rgb(0, 0, 0)" if is_dark else "rgb(255, 255, 255)")


def made_plan():
    """Return a plan for 1 to 64 workers, of figures that are made up."""
    from hvdtrain.optim.noise import NoiseScale
    from hvdtrain.verbs.plan.answer import answer
    from hvdtrain.verbs.plan.facts import Facts
    from hvdtrain.verbs.plan.network import Network
    from hvdtrain.verbs.plan.step import Bucket, Compute

    compute = Compute(0.03, 0.06, 0.01)
    buckets = (Bucket(0.2, 1 << 20), Bucket(1.0, 4 << 20))
    network = Network("gloo", 1e-3, None, None, 50e-6, 8 / 1e9, 0.05, 4)
    noise = NoiseScale(200.0, 150.0, 300.0, 50)
    known = {"measured_steps_s": {1: 0.1, 2: 0.14}, "steps_to_target": 1000, "recipe_batch": 64}
    facts = Facts("lm", "tokens", 128.0, 8, 1, 1, compute, compute, 1, 0.02, buckets, network, None, noise, **known)
    return answer(facts, 64, 2.0)
