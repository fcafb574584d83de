"""Settings: refused with what would be right, and the same from a file and from flags."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.config import (
    CacheConfig,
    ClusterConfig,
    GatewayConfig,
    InstanceConfig,
    ModelConfig,
    load_config,
    parse_config,
)
from memserve.errors import ConfigError
from memserve.flags import flags_of, to_flags, with_flags
from memserve.types import Role

SECTIONS = (ModelConfig, CacheConfig, InstanceConfig, GatewayConfig)


def test_an_empty_file_is_the_default_cluster() -> None:
    assert parse_config("") == ClusterConfig()


def test_a_file_sets_what_it_names_and_nothing_else() -> None:
    config = parse_config(
        """
        model.path = "some/model"
        cache.caching = "off"
        [[instance]]
        hbm_blocks = 10
        cpus = [0, 2]
        [[instance]]
        role = "prefill"
        count = 2
        """
    )
    assert config == ClusterConfig(
        model=ModelConfig(path="some/model"),
        cache=CacheConfig(caching="off"),
        instance=(
            InstanceConfig(hbm_blocks=10, cpus=(0, 2)),
            InstanceConfig(role=Role.PREFILL, count=2),
        ),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[instances]", "unknown key 'instances'; did you mean 'instance'?"),
        ("[gateway]\nprot = 1", "unknown key 'gateway.prot'; did you mean 'gateway.port'?"),
        ("[cache]\ncashing = 'off'", "did you mean 'cache.caching'?"),
        ("[[instance]]\n[[instance]]\nhbm_block = 3", "did you mean 'instance.hbm_blocks'?"),
        ("[gateway]\nxyzzy = 1", "known: host, port"),
        ("[gateway]\nport = '80'", r"Expected `int`.*gateway\.port"),
        ("[gateway]\nport = 65536", r"<= 65535.*gateway\.port"),
        ("[[instance]]\nhbm_blocks = 0", r">= 1.*instance\[0\]\.hbm_blocks"),
        ("[cache]\ncaching = 'some'", r"'some'.*cache\.caching"),
        ("model = 3", "Expected `object`.*model"),
        ("[gateway", "Expected ']'"),
    ],
)
def test_mistakes_are_named_with_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(text)


def test_errors_of_a_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    with pytest.raises(ConfigError, match=r"cluster\.toml: No such file"):
        load_config(path)
    path.write_text("[gateway]\nport = -1")
    with pytest.raises(ConfigError, match=r"cluster\.toml: .*gateway\.port"):
        load_config(path)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_explains_itself(section: type[msgspec.Struct]) -> None:
    """The help texts of the command line come from here."""
    assert all(flag.help for flag in flags_of(section))


def instances() -> st.SearchStrategy[InstanceConfig]:
    count = st.integers(1, 10**6)
    return st.builds(
        InstanceConfig,
        role=st.sampled_from(Role),
        hbm_blocks=count,
        threads=st.none() | count,
        cpus=st.none() | st.lists(st.integers(0, 99), min_size=1).map(tuple),
        host=st.sampled_from(["0.0.0.0", "::1"]),
    )


def caches() -> st.SearchStrategy[CacheConfig]:
    return st.builds(
        CacheConfig,
        caching=st.sampled_from(["off", "p", "pd", "full"]),
        aggregated=st.booleans(),
    )


def gateways() -> st.SearchStrategy[GatewayConfig]:
    seconds = st.floats(min_value=1e-3, max_value=1e6)
    template = st.none() | st.text("abc/.-_ ,", min_size=1).filter(lambda s: s[0] != "-")
    return st.builds(GatewayConfig, drain_seconds=seconds, chat_template=template)


@given(instances() | caches() | gateways())
def test_settings_survive_the_way_through_a_childs_command_line(section: msgspec.Struct) -> None:
    arguments = to_flags(section)
    by_name = {flag.name: flag.parameter for flag in flags_of(type(section))}
    values: dict[str, str | bool | None] = {}
    while arguments:
        name = arguments.pop(0)
        if name.startswith("--no-"):
            values[by_name["--" + name[5:]]] = False
        else:
            values[by_name[name]] = arguments.pop(0)
    assert with_flags(type(section)(), values) == section


def test_flags_change_only_what_was_given() -> None:
    base = InstanceConfig(hbm_blocks=7, threads=3)
    assert with_flags(base, {"threads": "4", "hbm_blocks": None}) == InstanceConfig(
        hbm_blocks=7, threads=4
    )


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("hbm_blocks", "many", "--hbm-blocks many: Expected `int`"),
        ("hbm_blocks", "0", "--hbm-blocks 0: Expected `int` >= 1"),
        ("role", "boss", "--role boss: .*'boss'"),
        ("cpus", "0,x", "--cpus 0,x: Expected `int`"),
    ],
)
def test_a_flags_mistake_names_the_flag(parameter: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_flags(InstanceConfig(), {parameter: value})


def test_the_model_is_named_by_its_own_flag() -> None:
    assert to_flags(ModelConfig(path="a/b")) == ["--model", "a/b"]
    assert with_flags(ModelConfig(), {"model": "a/b"}).path == "a/b"
