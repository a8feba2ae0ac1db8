"""A fresh clone works as README says: `uv run proxy.py` brings what the program needs, and no more; so does pip."""

import re
import tomllib
from typing import Any

from tests.support.commands import PROXY, REPOSITORY


def project() -> dict[str, Any]:
    found = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert isinstance(found, dict)
    return found


def inline_metadata() -> dict[str, Any]:
    """What proxy.py says of itself, by PEP 723's own rule. uv reads it where there is no pyproject.toml as well."""
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", PROXY.read_text(encoding="utf-8"))
    assert block, "proxy.py has no `# /// script` block"
    return tomllib.loads("".join(line[2:] for line in block["content"].splitlines(keepends=True)))


def test_what_uv_installs_for_proxy_py_alone_is_what_the_project_needs() -> None:
    """With the block `uv run proxy.py` installs this, and not the tests' packages, which `uv run pytest` brings."""
    script = inline_metadata()
    assert sorted(script["dependencies"]) == sorted(project()["dependencies"])
    assert script["requires-python"] == project()["requires-python"]


def test_the_licence_is_named_and_there() -> None:
    assert project()["license"] == "MIT"
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert text.startswith("MIT License") and "the contributors" in text
