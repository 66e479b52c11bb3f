"""Settings of `hexad serve`: where they come from, what goes before what, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hexad.errors import ConfigError
from hexad.server.settings import ServerSettings, collect


def test_flags_go_before_variables_and_those_before_the_file(tmp_path: Path) -> None:
    config = tmp_path / "hexad.toml"
    config.write_text('port = 1\nhost = "file"\nmax-waiting = 3\nserved-model-name = ["a", "b"]\n')
    environment = {"HEXAD_PORT": "2", "HEXAD_HOST": "environment", "HEXAD_API_KEY": "k1,k2", "OTHER": "x"}
    settings = collect({"port": 3}, environment, config)
    assert (settings.port, settings.host, settings.max_waiting) == (3, "environment", 3)
    assert settings.served_model_name == ["a", "b"]
    assert settings.api_keys == {"k1", "k2"}


def test_a_variable_may_name_the_file(tmp_path: Path) -> None:
    config = tmp_path / "hexad.toml"
    config.write_text("port = 7\nprefault = false\n")
    settings = collect({}, {"HEXAD_CONFIG": str(config)})
    assert (settings.port, settings.engine["prefault"]) == (7, False)


def test_variables_are_read_as_their_types() -> None:
    environment = {
        "HEXAD_ENABLE_PREFIX_CACHING": "false", "HEXAD_REQUEST_TIMEOUT": "1.5", "HEXAD_CORS": "https://a,https://b",
        "HEXAD_MAX_MODEL_LEN": "", "HEXAD_THREADS": "2",
    }  # fmt: skip
    settings = collect({}, environment)
    assert settings.cors == ["https://a", "https://b"]
    assert settings.engine["enable_prefix_caching"] is False
    assert (settings.request_timeout, settings.max_model_len, settings.threads) == (1.5, None, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 70000}, r"port \(from the command line\) is 70000: .*65535"),
        ({"port": "x"}, "port .* integer"),
        ({"prot": 1}, "no setting 'prot' .*; the settings are api_key, "),
        ({"max_waiting": -1}, "max_waiting .* is -1: .*greater than or equal to 0"),
        ({"request_timeout": 0}, "request_timeout .* greater than 0"),
        ({"log_format": "xml"}, "log_format .* 'text' or 'json'"),
        (
            {"tool_call_parser": "hermse"},
            r"tool_call_parser .* is 'hermse': it must be auto or one of hermes, ",
        ),
        ({"reasoning_parser": "x"}, "reasoning_parser .* 'auto', 'think' or 'none'"),
        ({"root_path": "api"}, "root_path .* must begin with /"),
        ({"chat_template": "no-such-file"}, "chat_template .* it is no Jinja template, and no file"),
        ({"ssl_keyfile": "key.pem"}, "^ssl_keyfile and ssl_ca_certs need an ssl_certfile"),
    ],
)
def test_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        collect(values, {})


def test_says_where_a_wrong_value_is_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"port \(from the environment\) is '-1'"):
        collect({}, {"HEXAD_PORT": "-1"})
    config = tmp_path / "hexad.toml"
    config.write_text("port = -1")
    with pytest.raises(ConfigError, match=r"port \(from .*hexad\.toml\) is -1"):
        collect({}, {}, config)


@pytest.mark.parametrize("content", [b"port = ", b"\xff", None])
def test_a_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    config = tmp_path / "hexad.toml"
    if content is not None:
        config.write_bytes(content)
    with pytest.raises(ConfigError, match=r"The settings in .*hexad\.toml cannot be read"):
        collect({}, {}, config)


def test_secrets_are_not_repeated() -> None:
    for name in ("api_key", "ssl_keyfile_password"):
        with pytest.raises(ConfigError) as caught:
            collect({name: {"secret": "s3cret"}}, {})
        assert "s3cret" not in str(caught.value)


def test_keys_from_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# people\nk1\n\n  k2  \n")
    assert collect({"api_key_file": keys, "api_key": ["k3"]}, {}).api_keys == {"k1", "k2", "k3"}


@pytest.mark.parametrize("content", [b"", b"# nobody\n", b"\xff\xfe", None])
def test_a_file_without_keys_is_no_open_door(content: bytes | None, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    if content is not None:
        keys.write_bytes(content)
    with pytest.raises(ConfigError, match=r"api_key_file .*keys"):
        _ = collect({"api_key_file": keys}, {}).api_keys


def test_a_chat_template_is_text_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}é", encoding="utf-8")
    assert collect({"chat_template": str(file)}, {}).chat_template == "{{ messages }}é"
    assert collect({"chat_template": "{{ bos_token }}"}, {}).chat_template == "{{ bos_token }}"


def test_root_path_loses_its_slash() -> None:
    assert collect({"root_path": "/api/"}, {}).root_path == "/api"


def test_the_engines_settings_have_the_engines_defaults_but_take_their_memory_at_once() -> None:
    from hexad.config import EngineConfig

    assert EngineConfig(**ServerSettings().engine) == EngineConfig(prefault=True)
