"""The pages of README and docs/ as parts that tests look at: code blocks, command lines, links, figures."""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]

_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code between fences."""

    page: Path
    line: int
    mark: str
    """The comment above it, such as "compiled only: needs Horovod"."""
    language: str
    code: str

    def __str__(self):
        return f"{name_of(self.page)}:{self.line}"


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks_of(page, language=None):
    text = page.read_text()
    found = [
        Block(page, text[: m.start("code")].count("\n"), m["mark"] or "", m["language"], textwrap.dedent(m["code"]))
        for m in _BLOCK.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def prose_of(page):
    """Return a page without its code blocks; comments stay."""
    return _BLOCK.sub("", page.read_text())


def inline_code_of(page):
    return re.findall(r"`([^`\n]+)`", prose_of(page))


def links_of(page):
    """Return text and target of each link and picture."""
    return re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "code", prose_of(page)))


def commands_of(block):
    """Return the words of each command of a shell block, without variables, comments and files that output goes to."""
    commands = []
    for line in re.sub(r" > \S+", "", block.code.replace("\\\n", " ")).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        command = []
        for word in [*lexer, ";"]:
            if word in ("&&", ";", "|"):
                commands += [command] if command else []
                command = []
            elif command or not re.fullmatch(r"[A-Z_]+=.*", word):
                command.append(word)
    return commands


def anchors_of(page):
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    plain = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain]


def sections_of(page):
    """Return the text below each heading."""
    return re.split(r"^#+ .*$", prose_of(page), flags=re.MULTILINE)


NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"


def numbers_in(text):
    """Return the numbers of a text as they are written; part of a word or a version is none."""
    return re.findall(rf"(?<![\w.,/-]){NUMBER}(?![\w/]|\.\d)|(?<![\w.,/-]){NUMBER}(?=s\b|m\d\d?s\b|ms\b)", text)


def is_in(number, text):
    """Tell whether a number stands in a text, perhaps with more digits there, or as a fraction of 1."""
    plain = number.replace(",", "")
    digits = len(plain.partition(".")[2].partition("e")[0])
    wanted, tolerance = float(plain), 0.5000001 * 10**-digits
    if "e" in plain:
        return plain in text
    found = [float(value.replace(",", "")) for value in re.findall(NUMBER, text)]
    return any(abs(scale * value - wanted) <= tolerance for value in found for scale in (1, 100))
