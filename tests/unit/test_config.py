"""Settings: refused with what would be right, and the same from a file and from flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    PlannerConfig,
    check_config,
    load_config,
    parse_bytes,
    parse_config,
    tables,
)
from memserve.errors import ConfigError
from memserve.flags import flags_of, to_flags, with_flags
from memserve.types import Role
from tests import config_document

SECTIONS = tuple(tables().values())


def test_an_empty_file_is_the_default_cluster() -> None:
    assert parse_config("") == ClusterConfig()


def test_a_file_may_have_every_table() -> None:
    text = "".join(f"[[{n}]]\n" if n == "instance" else f"[{n}]\n" for n in tables())
    assert parse_config(text) == ClusterConfig()


def test_the_reference_is_that_of_the_code() -> None:
    assert config_document.whole() == config_document.PAGE.read_text(), "run: make config-docs"


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
        ("[cache]\nblock_tokens = 0", r">= 1.*cache\.block_tokens"),
        ("[cache]\nblock_tokens = 4097", r"<= 4096.*cache\.block_tokens"),
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
        vllm_args=st.lists(st.text(), max_size=4).map(tuple),
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


@pytest.mark.parametrize("text", ["https://a.example,*", '["https://a.example", "*"]'])
def test_a_list_may_be_json_as_vllm_has_it(text: str) -> None:
    found = with_flags(GatewayConfig(), {"cors_origins": text})
    assert found.cors_origins == ("https://a.example", "*")
    with pytest.raises(ConfigError, match="--cors-origins"):
        with_flags(GatewayConfig(), {"cors_origins": '["a'})


def test_flags_change_only_what_was_given() -> None:
    base = InstanceConfig(hbm_blocks=7, threads=3)
    assert with_flags(base, {"threads": "4", "hbm_blocks": None}) == InstanceConfig(
        hbm_blocks=7, threads=4
    )


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("hbm_blocks", "many", "--hbm-blocks many: Expected `int | null`"),
        ("hbm_blocks", "0", "--hbm-blocks 0: Expected `int` >= 1"),
        ("role", "boss", "--role boss: .*'boss'"),
        ("cpus", "0,x", "--cpus 0,x: Expected `int`"),
        ("vllm_args", "--x 'y", "--vllm-args --x 'y: No closing quotation"),
    ],
)
def test_a_flags_mistake_names_the_flag(parameter: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_flags(InstanceConfig(), {parameter: value})


@pytest.mark.parametrize(
    ("text", "size"),
    [("64GiB", 64 << 30), ("1.5 MB", 1_500_000), ("4096", 4096), ("2TiB", 2 << 40), ("1KiB", 1024)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1GiB", "0GiB", "GiB", "1e3", "12 parsecs", "9" * 99])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size; sizes are like 64GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        (InstanceConfig(dram="many"), "'many' is no size"),
        (InstanceConfig(hbm="8GiBB"), "'8GiBB' is no size"),
        (
            InstanceConfig(engine="vllm", hbm_blocks=8),
            "hbm_blocks is the built-in engine's; a vLLM server takes --num-gpu-blocks-override",
        ),
        (
            InstanceConfig(engine="vllm", role=Role.DECODE),
            "'decode': a vLLM server hands KV over from",
        ),
        (
            InstanceConfig(engine="vllm", dram_blocks=9),
            "how large a block is",
        ),
        (
            InstanceConfig(engine="vllm", vllm_url="http://a:1", dram="1GiB"),
            "vllm_url: the server runs already",
        ),
        (InstanceConfig(vllm_url="http://a:1"), "instance.vllm_url needs engine = 'vllm'"),
        (
            InstanceConfig(engine="vllm", vllm_url="http://a:1", count=2),
            "vllm_url: the server runs already",
        ),
        (
            InstanceConfig(engine="vllm", vllm_pool="/run/pool"),
            "vllm_pool is of a server that runs",
        ),
        (InstanceConfig(engine="vllm", vllm_command=()), "instance.vllm_command is empty"),
        (InstanceConfig(port=80, count=2), "2 instances cannot share port 80"),
    ],
)
def test_settings_that_contradict_each_other(instance: InstanceConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(ClusterConfig(instance=(instance,)))


@pytest.mark.parametrize(
    "setting",
    [
        {"port": 8101},
        {"advertise": "http://a:1"},
        {"engine": "vllm", "vllm_url": "http://a:1"},
    ],
)
def test_a_planner_starts_no_more_of_what_only_one_instance_can_have(
    setting: dict[str, Any],
) -> None:
    instances = (InstanceConfig(), InstanceConfig(**setting))
    check_config(ClusterConfig(instance=instances))
    more = ClusterConfig(instance=instances, planner=PlannerConfig(max_members=4))
    name, value = list(setting.items())[-1]
    with pytest.raises(ConfigError, match=f"max_members = 4 .* instance.{name} = {value!r}"):
        check_config(more)
    check_config(ClusterConfig(planner=PlannerConfig(max_members=4)))


@pytest.mark.parametrize(
    "instance",
    [
        InstanceConfig(engine="vllm", role=Role.PREFILL, dram="1GiB"),
        InstanceConfig(engine="vllm", role=Role.DECODE, vllm_url="http://a:1", vllm_pool="/p"),
    ],
)
def test_a_vllm_server_with_host_memory_may_have_any_role(instance: InstanceConfig) -> None:
    check_config(ClusterConfig(instance=(instance,)))


@pytest.mark.parametrize("name", ["hbm", "dram"])
@pytest.mark.parametrize("text", ["100%", "0%", "-1%", "1e1%", "nan%", "%", "8 gigabytes", ""])
def test_wrong_memory_is_named(name: str, text: str) -> None:
    config = ClusterConfig(instance=(InstanceConfig(**{name: text}),))
    with pytest.raises(ConfigError, match=f"instance.{name}: '{text}' is n"):
        check_config(config)


def test_the_models_path_may_be_called_as_its_flag_is() -> None:
    assert parse_config("[model]\nmodel = 'a/b'").model == ModelConfig(path="a/b")
    with pytest.raises(ConfigError, match=r"model.model and model.path are the same"):
        parse_config("[model]\nmodel = 'a/b'\npath = 'a/b'")
    with pytest.raises(ConfigError, match="Expected `str`"):
        parse_config("[model]\nmodel = 3")


def test_the_model_is_named_by_its_own_flag() -> None:
    assert to_flags(ModelConfig(path="a/b")) == ["--model", "a/b"]
    assert with_flags(ModelConfig(), {"model": "a/b"}).path == "a/b"
