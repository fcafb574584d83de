"""What a package index shows of the package, and what belongs into it."""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_packages_page_has_no_links_into_the_repository(settings: dict[str, Any]) -> None:
    """The repository names no home page that they could lead to."""
    text = (ROOT / settings["project"]["readme"]).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]*)\)|<(?:a|img)\s[^>]*(?:href|src)=\"([^\"]*)\"", text)
    assert links
    assert all(one.startswith("https://") for pair in links for one in pair if one)


def test_a_package_is_described(settings: dict[str, Any]) -> None:
    project = settings["project"]
    assert {"description", "keywords", "classifiers", "license"} <= set(project)
    assert not [one for one in project["classifiers"] if one.startswith("License")]  # PEP 639
    assert "Programming Language :: Python :: 3.11" in project["classifiers"]


@pytest.mark.parametrize("name", ["README.md", "docs/install.md"])
def test_links_within_the_repository_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    folder = (ROOT / name).parent
    for link in re.findall(r"\]\(([^)]*)\)", text):
        if not link.startswith(("https://", "#")):
            assert (folder / link.partition("#")[0]).exists(), link


def test_every_page_and_template_is_packed(settings: dict[str, Any]) -> None:
    patterns = settings["tool"]["setuptools"]["package-data"]["memserve"]
    package = Path(str(files("memserve")))
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    there = {
        p
        for p in package.rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc", ".nbi", ".nbc")
    }
    assert there == packed
