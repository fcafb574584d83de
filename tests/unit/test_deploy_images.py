"""deploy/docker: no engine builds the images here; what the files name is there, and is meant."""

from __future__ import annotations

import io
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml
from dockerfile_parse import DockerfileParser

from memserve.cli import app
from tests.chart_harness import CHART, VALUES, read_values

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy/docker").glob("Dockerfile*"))
USER = "10001:10001"


class Step(NamedTuple):
    stage: int
    instruction: str
    value: str


def steps(file: Path) -> Iterator[Step]:
    parser = DockerfileParser(fileobj=io.BytesIO(file.read_bytes()))
    stage = -1
    for found in parser.structure:
        stage += found["instruction"] == "FROM"
        if found["instruction"] != "COMMENT":
            yield Step(stage, found["instruction"], found["value"])


@pytest.fixture(params=FILES, ids=lambda file: file.name)
def image(request: pytest.FixtureRequest) -> list[Step]:
    return list(steps(request.param))


def values_of(image: list[Step], instruction: str, stage: int | None = None) -> list[str]:
    return [
        step.value
        for step in image
        if step.instruction == instruction and stage in (None, step.stage)
    ]


def included() -> list[str]:
    """Paths that .dockerignore, which leaves everything out, takes in again."""
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in lines
    return [line[1:] for line in lines if line.startswith("!")]


def test_what_is_copied_is_there(image: list[Step]) -> None:
    stages = {
        match[1]: number
        for number, value in enumerate(values_of(image, "FROM"))
        if (match := re.search(r" AS (\w+)$", value))
    }
    for step in image:
        if step.instruction != "COPY":
            continue
        *sources, _ = step.value.split()
        if sources[0].startswith("--from="):
            assert stages[sources[0].removeprefix("--from=")] < step.stage
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(source == kept or source.startswith(f"{kept}/") for kept in included())


def test_the_wheel_s_sources_are_whole(image: list[Step]) -> None:
    """What pyproject.toml reads while the wheel is built is copied into that stage."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = {"pyproject.toml", "src", project["readme"], *project["license-files"]}
    copied = {source for value in values_of(image, "COPY", 0) for source in value.split()[:-1]}
    assert needed <= copied
    assert any(
        "pip wheel" in value and "--no-deps" in value for value in values_of(image, "RUN", 0)
    )


def test_extras_are_those_of_the_project(image: list[Step]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
        "optional-dependencies"
    ]
    named = {
        extra
        for value in values_of(image, "RUN")
        for group in re.findall(r"\.whl\)\[([\w,]+)\]", value)
        for extra in group.split(",")
    }
    named |= {value.partition("=")[2] for value in values_of(image, "ARG") if "EXTRAS" in value}
    assert named
    assert named <= extras.keys()


def test_the_image_is_not_root_s(image: list[Step]) -> None:
    last = image[-1].stage
    assert values_of(image, "USER", last)[-1] == USER
    # Nothing is done as root after that.
    order = [step.instruction for step in image if step.stage == last]
    assert "RUN" not in order[len(order) - order[::-1].index("USER") :]
    assert any("useradd --uid 10001 " in value for value in values_of(image, "RUN", last))


def test_the_command_is_memserve_behind_a_first_process(image: list[Step]) -> None:
    """Process 1 has to take signals before Python does, and orphans of a vLLM."""
    last = image[-1].stage
    (entry,) = values_of(image, "ENTRYPOINT", last)
    (command,) = values_of(image, "CMD", last)
    assert yaml.safe_load(entry) == ["tini", "--", "memserve"]
    assert any("tini" in value for value in values_of(image, "RUN", last))
    root = typer.main.get_command(app)
    with pytest.raises(typer.Exit):  # which `--help` raises
        root.make_context("memserve", yaml.safe_load(command))


def test_commands_in_comments_name_what_is_there() -> None:
    for file in FILES:
        text = file.read_text("utf-8")
        (command,) = re.findall(r"docker build((?:.*\\\n)*.*)", text)
        options = re.findall(r"--build-arg (\w+)=", text)
        assert str(file.relative_to(ROOT)) in command
        arguments = {value.partition("=")[0] for value in values_of(list(steps(file)), "ARG")}
        assert set(options) <= arguments


def test_charts_and_images_agree() -> None:
    """The chart's user is the image's, and its caches are where the image may write."""
    chart: dict[str, Any] = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    helpers = (CHART / "templates/_helpers.tpl").read_text("utf-8")
    user, group = USER.split(":")
    assert f"runAsUser: {user}" in helpers
    assert f"fsGroup: {group}" in helpers
    for file in FILES:
        environment = " ".join(values_of(list(steps(file)), "ENV"))
        for name, path in re.findall(r"(\w+)=(/cache\S*)", environment):
            assert re.search(rf"- name: {name}\n +value: {path}\n", helpers), name
        assert f":{chart['appVersion']}" in file.read_text("utf-8")
    assert all(read_values(name)["groups"] for name in VALUES)
