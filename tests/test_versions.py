"""The versions in constraints/ are those that pyproject.toml promises."""

import re
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

from tests.launch import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
OF_EXTRAS = {"transformers", "pytest", "pytest-timeout", "pytest-xdist"}
"""What the Makefile installs of the extras into the oldest environment."""


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def constraints(which: str) -> dict[str, Version]:
    lines = (ROOT / "constraints" / f"{which}.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    pattern = r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!]+"  # no addresses, no local builds
    assert [line for line in pinned if not re.fullmatch(pattern, line)] == []
    return {name_of(name): Version(version) for name, _, version in (line.partition("==") for line in pinned)}


def by_name(texts: list[str]) -> dict[str, Requirement]:
    return {name_of(requirement.name): requirement for requirement in map(Requirement, texts)}


DEPENDENCIES = by_name(PROJECT["dependencies"])
OPTIONAL = by_name([text for extra in PROJECT["optional-dependencies"].values() for text in extra])


def floor(requirement: Requirement) -> Version:
    (lowest,) = (Version(bound.version) for bound in requirement.specifier if bound.operator == ">=")
    return lowest


def test_floors_are_the_oldest_versions():
    oldest = constraints("oldest")
    overrides = by_name(PYPROJECT["tool"]["uv"]["override-dependencies"])
    for promised in (DEPENDENCIES, {name: OPTIONAL[name] for name in OF_EXTRAS}, overrides):
        floors = {name: floor(requirement) for name, requirement in promised.items()}
        assert floors == {name: oldest[name] for name in promised}


def test_newest_versions_are_of_every_dependency():
    newest = constraints("newest")
    for name, requirement in (DEPENDENCIES | OPTIONAL).items():
        assert name == PROJECT["name"] or newest[name] in requirement.specifier, name
