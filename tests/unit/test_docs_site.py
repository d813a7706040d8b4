"""The site: all errors, settings and public names are on it, and it is built without a warning."""

import ast
import html
import importlib
import importlib.util
import json
import re
import subprocess
import sys

import pages
import pytest
from browser import visit, why_no_browser

import hvdtrain
from hvdtrain import cli, errors
from hvdtrain.optim.table import all_settings
from hvdtrain.recipes import RECIPES, load_recipe
from hvdtrain.settings.flags import known_flags

DOCS = pages.ROOT / "docs"
PACKAGE = pages.ROOT / "hvdtrain"


@pytest.fixture
def tools(monkeypatch):
    """Import a module of docs/tools by its name."""
    monkeypatch.setattr(sys, "path", [str(DOCS / "tools"), *sys.path])
    return importlib.import_module


def areas():
    """Return the files and folders whose errors the page of messages asks for."""
    asked = re.findall(r"```\{messages\} (.*)", (DOCS / "troubleshooting.md").read_text())
    return [line.split() for line in asked]


def test_every_place_that_makes_an_error_is_found(tools):
    """Counted here by the classes themselves, there by names in the source."""
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)} | {
        "SetupError"
    }
    made = {
        (str(path.relative_to(PACKAGE)), node.lineno)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in kinds
    }
    found = {(message.file, message.line) for message in tools("messages_page").all_messages()}
    assert made <= found
    assert len(made) > 250


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_reason_why_a_setting_has_no_effect_is_found(tools, recipe):
    """Of the reasons that settings give by themselves, with what is filled in left out."""
    known = [text for message in tools("messages_page").all_messages() for text in message.texts]
    patterns = [".*".join(map(re.escape, text.split("…"))) for text in known if "has no effect: " in text]
    for name, reason in load_recipe(recipe).unused():
        assert any(re.fullmatch(pattern, f"{name} has no effect: {reason}", re.DOTALL) for pattern in patterns), reason


def test_every_error_is_on_the_page_once(tools):
    page = tools("messages_page")
    all_areas = [area for line in areas() for area in line]
    assert len({*all_areas}) == len(all_areas)
    assert [area for area in all_areas if not (PACKAGE / area).exists()] == []
    shown = [message for line in areas() for message in page.messages_of(line, all_areas)]
    lost = {(message.file, message.line) for message in {*page.all_messages()} - {*shown}}
    assert lost == set(), "give its file a section of docs/troubleshooting.md"
    assert len(shown) == len(page.all_messages())


def test_errors_without_a_text_only_pass_on_another(tools):
    silent = [message for message in tools("messages_page").all_messages() if not message.texts]
    assert len(silent) <= 9, silent


@pytest.mark.parametrize(
    ("code", "texts"),
    [
        ('ConfigError(f"{path} is no file")', ["… is no file"]),
        ('ConfigError("give one" if few else f"take {n} away")', ["give one", "take … away"]),
        ('ConfigError("one " + rest)', ["one …"]),
        ("ConfigError(f\"{path} is {'small' if few else 'large'}\")", ["… is small", "… is large"]),
    ],
)
def test_a_message_is_read_from_the_source(tools, code, texts):
    page = tools("messages_page")
    assert page._Module(ast.parse(code)).texts_of(ast.parse(code).body[0].value.args[0], {}) == texts


def test_public_names_are_on_the_page():
    text = (DOCS / "api.md").read_text()
    own = [name for name in hvdtrain.__all__ if name not in vars(errors)]
    assert [name for name in own if not re.search(rf":: hvdtrain\.{name}$", text, re.MULTILINE)] == []
    assert "automodule:: hvdtrain.errors" in text


def test_every_verb_has_its_options_on_the_page():
    asked = re.findall(r"\{verb-options\} (\w+)", (DOCS / "settings.md").read_text())
    assert asked == [*cli.VERBS]
    assert re.findall(r"\{program-options\} (\w+)", (DOCS / "settings.md").read_text()) == ["supervise", "setup"]


def test_every_recipe_module_has_its_settings_on_the_page():
    asked = re.findall(r"\{recipe-settings\} (\w+)", (DOCS / "settings.md").read_text())
    assert {RECIPES[name][0] for name in asked} == {module for module, _ in RECIPES.values()}


def has_sphinx():
    return all(importlib.util.find_spec(name) for name in ("sphinx", "furo", "myst_parser"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built without a warning."""
    if not has_sphinx():
        pytest.skip("launch/setup.sh has not yet installed sphinx, furo and myst-parser here")
    folder = tmp_path_factory.mktemp("docs")
    options = ["--fail-on-warning", "--keep-going", "-q", "-d", str(folder / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(folder / "site")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tools, site):
    settings, messages = (words_of(site / f"{name}.html") for name in ("settings", "troubleshooting"))
    recipes = {name for recipe in RECIPES for name in known_flags(load_recipe(recipe))}
    for name in recipes | set(all_settings("optim.")):
        assert f"--{name.replace('_', '-')}" in settings
    assert "--hosts-script" in settings
    assert "--wheel-dir" in settings
    texts = {text for message in tools("messages_page").all_messages() for text in message.texts}
    assert [text for text in texts if " ".join(text.split()) not in messages] == []


# In a page: what a browser has made of it, what sticks out to the right, and what was fetched for it.
READER = """
<script>
addEventListener("load", () => setTimeout(() => {
  const shown = document.documentElement.clientWidth;
  const found = {width: innerWidth, too_wide: document.documentElement.scrollWidth > shown, out: [],
    dark: matchMedia("(prefers-color-scheme: dark)").matches, page: location.pathname.split("/").pop(),
    fetched: performance.getEntriesByType("resource").map((entry) => entry.name)};
  if (found.too_wide)
    for (const one of document.querySelectorAll("article *, header *, footer *"))
      if (one.getBoundingClientRect().right > shown + 1) found.out.push(one.outerHTML.slice(0, 100));
  parent.postMessage(found, "*");
}, 200));
</script>
"""
# Around several pages, since a window of Chromium's is 500 pixels wide at least: collects what they say.
FRAMES = """<!DOCTYPE html><html><body>{frames}<pre id="found"></pre><script>
const all = [];
addEventListener("message", ({{data}}) => {{
  all.push(data); document.getElementById("found").textContent = JSON.stringify(all);
}});
</script></body></html>
"""
# A kind of page, and the widths it is looked at in: prose, generated tables, messages, docstrings, blocks of code.
VISITED = [("index", 390), ("index", 1280), ("settings", 390), ("troubleshooting", 390), ("api", 390), ("api", 1280)]
VISITED += [("how-to/vision", 390), ("genindex", 390)]


@pytest.fixture
def look(tmp_path):
    """Open pages, `(file, width)`, in one browser; returns what became of each, and what they said."""
    if reason := why_no_browser():
        pytest.skip(reason)

    def look(pages, is_dark=False):
        frames = []
        for number, (file, width) in enumerate(pages):
            copy = file.with_name(f"{tmp_path.name}-{number}.html")  # beside it, for its links
            copy.write_text(file.read_text().replace("</body>", f"{READER}</body>"))
            frames.append(f'<iframe src="file://{copy}" style="width: {width}px; height: 900px; border: 0"></iframe>')
        whole = tmp_path / "frames.html"
        whole.write_text(FRAMES.format(frames="".join(frames)))
        seen = visit(whole, tmp_path, is_dark=is_dark)
        found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', seen.dom, re.DOTALL)[1]))
        assert len(found) == len(pages)
        return sorted(found, key=lambda one: one["page"]), seen.console

    return look


@pytest.mark.slow
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_pages_in_a_browser(site, look, is_dark):
    """They say nothing on the console, are no wider than the screen, and fetch nothing from elsewhere."""
    found, console = look([(site / f"{page}.html", width) for page, width in VISITED], is_dark)
    assert console == []
    assert [(one["width"], one["dark"]) for one in found] == [(width, is_dark) for _, width in VISITED]
    assert [one["out"][:3] for one in found if one["too_wide"]] == []
    elsewhere = [name for one in found for name in one["fetched"] if not name.startswith(("file:", "data:"))]
    assert elsewhere == []


@pytest.mark.slow
def test_the_browser_would_tell(tmp_path, look):
    """The test above can fail: what is too wide, what is asked for elsewhere and what is said are seen."""
    page = tmp_path / "bad.html"
    wide = '<article><div style="width: 500px">wide</div></article>'
    page.write_text(
        f"<html><body>{wide}<img src='http://127.0.0.1:9/a.png'><script>console.error('no')</script></body>"
    )
    (found,), console = look([(page, 390)])
    assert found["too_wide"]
    assert "500px" in "".join(found["out"])
    assert found["fetched"] == ["http://127.0.0.1:9/a.png"]
    assert any("no" in line for line in console)


def words_of(page):
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", page.read_text())).split())
