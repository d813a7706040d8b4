"""What pages ask for as ```` ```{name} argument ````: parts that are made from the source when the site is built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import messages_page
import settings_page
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

PAGE_OF_MESSAGES = Path(__file__).parents[1] / "troubleshooting.md"
_HIDDEN_COLON = "\x00"


class SharedSettings(SphinxDirective):
    """The settings of all recipes."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        """Return the nodes."""
        return self.parse_text_to_nodes(settings_page.shared())


class RecipeSettings(SphinxDirective):
    """The further settings of the recipe that is named."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the nodes."""
        return self.parse_text_to_nodes(settings_page.of_recipe(self.arguments[0]))


class OptimizerSettings(SphinxDirective):
    """The further settings of each optimizer."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        """Return the nodes."""
        return self.parse_text_to_nodes(settings_page.of_optimizers())


class VerbOptions(SphinxDirective):
    """The options of the verb that is named."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the nodes."""
        return self.parse_text_to_nodes(settings_page.of_verb(self.arguments[0]))


class ProgramOptions(SphinxDirective):
    """What `--help` says of the options of `setup` or `supervise`, which have no settings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the nodes."""
        text = settings_page.of_program(self.arguments[0])
        return [nodes.literal_block(text, text, language="text")]


class Presets(SphinxDirective):
    """What each recipe sets."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        """Return the nodes."""
        return self.parse_text_to_nodes(settings_page.presets())


class ShortNames(SphinxDirective):
    """The short names of settings."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        """Return the nodes."""
        return self.parse_text_to_nodes(settings_page.short_names())


class Messages(SphinxDirective):
    """The errors that are raised in the files or folders that are named."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the nodes."""
        found = messages_page.messages_of(self.arguments[0].split(), areas_of_page())
        if not found:
            raise self.error(f"no error is raised in {self.arguments[0]}")
        return self.parse_text_to_nodes(messages_page.listed(found))


def areas_of_page() -> list[str]:
    """Return all files and folders that the page of messages names."""
    asked = re.findall(r"```\{messages\} (.*)", PAGE_OF_MESSAGES.read_text())
    return [area for line in asked for area in line.split()]


def _keep_colons(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Hide the colons of an attribute's docstring from napoleon, which would take what is before one for a type."""
    if what == "attribute":
        lines[:] = [line.replace(":", _HIDDEN_COLON) for line in lines]


def _mark_code(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Say which lines are code: what is indented behind an empty line, or behind "Example:"."""
    marked: list[str] = []
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        last = next((other for other in reversed(lines[:number]) if other.strip()), "")
        is_first = line.startswith("    ") and last and not last.startswith(" ")
        if is_first and (not before.strip() or last == "Example:"):
            if last == "Example:":
                marked.pop()
            marked += ["Example::", ""] if last == "Example:" else ["::", ""]
        marked.append(line)
    lines[:] = marked


def _give_colons_back(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(_HIDDEN_COLON, ":") for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directives to Sphinx."""
    app.add_directive("shared-settings", SharedSettings)
    app.add_directive("recipe-settings", RecipeSettings)
    app.add_directive("optimizer-settings", OptimizerSettings)
    app.add_directive("verb-options", VerbOptions)
    app.add_directive("program-options", ProgramOptions)
    app.add_directive("presets", Presets)
    app.add_directive("short-names", ShortNames)
    app.add_directive("messages", Messages)
    app.connect("autodoc-process-docstring", _keep_colons, priority=400)  # napoleon's own has 500
    app.connect("autodoc-process-docstring", _mark_code, priority=400)
    app.connect("autodoc-process-docstring", _give_colons_back, priority=600)
    return {"version": "1", "parallel_read_safe": True}
