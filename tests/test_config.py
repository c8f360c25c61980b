"""The configuration: what is accepted, what is refused and where, and that nothing can crash it."""

from __future__ import annotations

import os
import string
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import trustme
import yaml
from hypothesis import given
from hypothesis import strategies as st

from comfyd import config
from comfyd.config import Config, Listen, Retention, Secret, Server
from comfyd.errors import ConfigError

BASE = Path("/base")
EXAMPLE = Path(__file__).parent.parent / "config" / "comfyd.yaml"


def parse(text: str, **environ: str) -> Config:
    return config.parse(textwrap.dedent(text), file=Path("c.yaml"), base=BASE, environ=environ)


def refused(text: str, **environ: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, **environ)
    return caught.value


def one_server(**settings: str) -> str:
    """A configuration with one server; values are YAML as it is."""
    entry = {"name": "gpu", "url": "http://127.0.0.1:8188"} | settings
    return "servers: [{" + ", ".join(f"{key}: {value}" for key, value in entry.items()) + "}]"


# --- defaults ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", "null", "tracker:\nlog: ~"])
def test_nothing_said_means_all_defaults(text):
    assert parse(text) == config.defaults(BASE)


def test_the_example_says_every_setting_with_its_default():
    assert config.load(EXAMPLE) == config.defaults(EXAMPLE.parent)

    said = yaml.safe_load(EXAMPLE.read_text())
    assert set(said) == {field.removesuffix("_s") for field in Config.__dataclass_fields__}
    for key, value in said.items():
        if isinstance(value, dict):
            fields = getattr(config.defaults(BASE), key).__dataclass_fields__
            assert set(value) == {field.removesuffix("_s") for field in fields}, key
    fields = Server.__dataclass_fields__
    assert set(said["servers"][0]) == {field.removesuffix("_s") for field in fields}


def test_defaults_are_those_of_the_contract():
    cfg = config.defaults(BASE)
    assert (cfg.spool, cfg.state) == (BASE / "spool", BASE / "state")
    assert cfg.servers == (Server(name="local", url="http://127.0.0.1:8188"),)
    assert cfg.servers[0].window is None
    assert cfg.retention.events == Retention(age_s=30 * 86400)
    assert cfg.jobs.max_file_bytes == 16 * 1024 * 1024
    assert str(cfg.metrics.listen) == "127.0.0.1:9818"


# --- single values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("15s", 15), ("1.5s", 1.5), ("5m", 300), ("2h", 7200), ('"30 d"', 2592000)],
)
def test_durations(text, seconds):
    assert parse(f"audit: {{interval: {text}}}").audit.interval_s == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["15", "yes", "0s", "-1s", "1e3s", "5M", "s", "null", "[1s]", "{a: 1s}", "1h30m", "99999d",
     "0.1ms", "9" * 400 + "s", "1:30", ".inf", "2020-01-01", "1\u0661s", "''"],
)  # fmt: skip
def test_no_durations(text):
    error = refused(f"tracker:\n  ping_interval: {text}")
    assert (error.key, error.line, error.col) == ("tracker.ping_interval", 2, 18)


@pytest.mark.parametrize(
    ("text", "size"),
    [("16MiB", 16 << 20), ("4 GiB", 4 << 30), ("500kB", 500_000), ("1.5KiB", 1536), ("7", 7),
     ("7B", 7), ("1TB", 10**12), ("9223372036854775807", 2**63 - 1)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse(f"outputs: {{max_bytes: {text}}}").outputs.max_bytes == size


@pytest.mark.parametrize(
    "text", ["0", "-1", "16 mib", "16K", "1.5", "1.5B", "true", "1e3", "9TiB9", "9999999999TiB"]
)
def test_no_sizes(text):
    assert refused(f"outputs: {{max_bytes: {text}}}").key == "outputs.max_bytes"


def test_the_free_space_to_leave_may_be_none():
    assert parse("outputs: {min_free_bytes: 0}").outputs.min_free_bytes == 0


@pytest.mark.parametrize("text", ["0", "101", "-3", "010", "0x10", "1_0", "3.0", "'3'", "three"])
def test_no_numbers_of_attempts(text):
    assert refused(f"history: {{attempts: {text}}}").key == "history.attempts"


@pytest.mark.parametrize("text", ["yes", "on", "True", "1", "'true'", "null"])
def test_no_booleans(text):
    assert refused(f"outputs: {{include_temp: {text}}}").key == "outputs.include_temp"


@pytest.mark.parametrize(
    ("text", "listen"),
    [("0.0.0.0:80", Listen("0.0.0.0", 80)), ("'[::1]:0'", Listen("::1", 0)),
     ("localhost:9818", Listen("localhost", 9818)), ("10:30", Listen("10", 30))],
)  # fmt: skip
def test_listen(text, listen):
    assert parse(f"metrics: {{listen: {text}}}").metrics.listen == listen


@pytest.mark.parametrize(
    "text",
    ["9818", "':9818'", "'::1:9818'", "'[1.2]:1'", "'[::1]'", "a:65536", "a:b", "'a b:1'", "~"],
)
def test_no_listen(text):
    assert refused(f"metrics: {{listen: {text}}}").key == "metrics.listen"


def test_listen_is_written_as_it_is_read():
    assert str(Listen("::1", 9818)) == "[::1]:9818"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("null", None), ("14d", Retention(age_s=1209600)),
     ("{age: 1h, count: 10000, bytes: 50GiB}", Retention(age_s=3600, count=10000, bytes=50 << 30)),
     ("{count: 0}", Retention(count=0))],
)  # fmt: skip
def test_retention(text, expected):
    assert parse(f"retention: {{done: {text}}}").retention.done == expected


@pytest.mark.parametrize(
    ("text", "key"),
    [("{}", "retention.done"), ("[14d]", "retention.done"), ("14", "retention.done"),
     ("{age: 14}", "retention.done.age"), ("{ages: 14d}", "retention.done.ages")],
)  # fmt: skip
def test_no_retention(text, key):
    assert refused(f"retention: {{done: {text}}}").key == key


def test_relative_paths_start_from_the_file():
    cfg = parse("spool: in\nstate: /var/state\nworkflows: ../w")
    assert (cfg.spool, cfg.state) == (BASE / "in", Path("/var/state"))
    assert cfg.workflows == BASE / "../w"


@pytest.mark.parametrize("text", ["~/spool", "7", "''", '"a\\0b"', "[]", "2020-01-01"])
def test_no_paths(text):
    assert refused(f"spool: {text}").key == "spool"


def test_spool_and_state_must_differ():
    assert refused("spool: x\nstate: x").key == "state"


def test_a_first_wait_longer_than_the_longest_is_refused():
    error = refused("tracker: {reconnect_first: 31s}")
    assert (error.key, error.line) == ("tracker.reconnect_first", 1)


def test_protection_that_is_not_there_is_not_promised():
    error = refused(f"metrics: {{web_config: {EXAMPLE}}}")
    assert "is not a setting; there are tls_server_config," in error.problem


def test_a_certificate_file_must_exist_and_hold_certificates(tmp_path):
    server = {"url": "https://gpu"}
    assert refused(one_server(ca_file=str(tmp_path / "no.pem"), **server)).key.endswith(".ca_file")
    (tmp_path / "ca.pem").touch()
    problem = refused(one_server(ca_file=str(tmp_path / "ca.pem"), **server)).problem
    assert problem.startswith("holds no usable certificates (PEM)")
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    found = parse(one_server(ca_file=str(tmp_path / "ca.pem"), **server)).servers[0]
    assert found.ca_file == tmp_path / "ca.pem"


# --- servers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("https://GPU.example:443/", "https://gpu.example:443"),
     ("http://localhost:8188/Comfy/", "http://localhost:8188/Comfy"),
     ("http://[::1]:8188", "http://[::1]:8188"), ("http://127.9.9.9", "http://127.9.9.9")],
)  # fmt: skip
def test_urls(text, expected):
    assert parse(one_server(url=f"'{text}'")).servers[0].url == expected


@pytest.mark.parametrize(
    "text",
    ["ftp://h", "h:8188", "//h", "http://", "http:///x", "http://h:99999", "http://h:0", "http://h:x",
     "http://user:hunter2@localhost", "http://hunter2@localhost", "http://@localhost",
     "http://h?token=hunter2", "http://h/?", "http://h#f", "http://h\\x", "http://[::1",
     "http://h h", "http://\u0434.example", "http://192.168.1.5:8188", "http://localhost.evil.example"],
)  # fmt: skip
def test_no_urls(text):
    error = refused(one_server(url=f"'{text}'"))
    assert error.key == "servers[0].url"
    assert "hunter2" not in str(error)


def test_plain_http_to_another_host_must_be_asked_for():
    assert parse(one_server(url="http://10.0.0.5:8188", insecure="true")).servers[0].insecure
    assert refused(one_server(url="http://10.0.0.5:8188")).key == "servers[0].url"
    assert refused(one_server(url="https://gpu", insecure="true")).key == "servers[0].insecure"


@pytest.mark.parametrize(("text", "window"), [("auto", None), ("1", 1), ("1000", 1000)])
def test_window(text, window):
    assert parse(one_server(window=text)).servers[0].window == window


@pytest.mark.parametrize("text", ["0", "1001", "Auto", "-1", "null", "[1]", "2s"])
def test_no_window(text):
    assert refused(one_server(window=text)).key == "servers[0].window"


@pytest.mark.parametrize("name", ["GPU", "-a", "a_b", "a" * 33, "7", "''", "yes"])
def test_no_server_names(name):
    assert refused(one_server(name=name)).key == "servers[0].name"


def test_servers_are_told_apart():
    a, b = "{name: a, url: http://localhost:1}", "{name: b, url: http://localhost:2}"
    assert [server.name for server in parse(f"servers: [{a}, {b}]").servers] == ["a", "b"]
    same_name = refused(f"servers:\n- {a}\n- {b.replace('b', 'a', 1)}")
    assert (same_name.key, same_name.line, same_name.col) == ("servers[1].name", 3, 10)
    assert refused(f"servers: [{a}, {b.replace(':2', ':1/')}]").key == "servers[1].url"


@pytest.mark.parametrize("text", ["[]", "null", "{}", "local", "[local]", "[[]]"])
def test_no_servers(text):
    assert refused(f"servers: {text}").key.startswith("servers")


def test_a_server_needs_a_name_and_a_url():
    assert refused("servers: [{name: a}]").key == "servers[0].url"
    assert refused("servers: [{url: http://localhost}]").key == "servers[0].name"
    assert refused("servers: [null]").problem == "is missing"


# --- secrets ----------------------------------------------------------------------------------


def headers_of(text: str, **environ: str) -> dict[str, str]:
    found = parse(one_server(headers=text), **environ).servers[0].headers
    return {name: value.reveal() for name, value in found.items()}


def test_header_values_come_from_three_places(tmp_path):
    (tmp_path / "token").write_text("Bearer hunter2\n")
    assert headers_of("{X-Site: abc}") == {"X-Site": "abc"}
    assert headers_of(f"{{A: {{file: {tmp_path}/token}}}}") == {"A": "Bearer hunter2"}
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert headers_of("{A: {credential: token}}", **environ) == {"A": "Bearer hunter2"}


def test_secrets_do_not_show():
    cfg = parse(one_server(headers="{X-Site: hunter2}"))
    secret = cfg.servers[0].headers["X-Site"]
    assert "hunter2" not in f"{cfg} {cfg!r} {secret} {secret!r}"
    assert secret == Secret("hunter2") != Secret("hunter3")
    assert hash(secret) == hash(Secret("hunter2"))


@pytest.mark.parametrize("name", ["X-Author", "X-Keywords", "X-Forwarded-User", "Accept"])
def test_what_only_sounds_like_a_secret_may_be_written(name):
    assert headers_of(f"{{{name}: fox}}") == {name: "fox"}


@pytest.mark.parametrize(
    "name",
    ["Authorization", "cookie", "X-API-Key", "X-Auth-Token", "X-Auth", "CF-Access-Client-Secret"],
)
def test_a_secret_is_not_written_into_the_configuration(name):
    error = refused(one_server(headers=f"{{{name}: hunter2}}"))
    assert "is a secret: say {file: PATH} or {credential: NAME}" in error.problem
    assert "hunter2" not in str(error)


def test_configurations_with_other_secrets_differ():
    one, other = (parse(one_server(headers=f"{{A: {value}}}")) for value in ("x", "y"))
    assert one != other
    assert one == replace(other, servers=one.servers)


@pytest.mark.parametrize(
    "text",
    ["{A: 7}", "{A: null}", "{A: ''}", '{A: "a\\nb"}', "{A: caf\u00e9}", "{A: []}", "{A: {}}",
     "{A: {file: a, credential: b}}", "{A: {vault: a}}", "{A: {file: /dev/zero}}", "{A: {file: 7}}",
     "{A: {file: nowhere}}", "{A: {credential: a}}", "{'a b': c}", "{Host: a}", "{UPGRADE: a}",
     "{Sec-WebSocket-Key: a}", "{x: a, X: b}", "[A]", "A", "null"],
)  # fmt: skip
def test_no_headers(text):
    assert refused(one_server(headers=text)).key.startswith("servers[0].headers")


@pytest.mark.parametrize("name", ["a/b", "..", "'.'"])
def test_a_credential_is_a_name(name, tmp_path):
    error = refused(
        one_server(headers=f"{{A: {{credential: {name}}}}}"), CREDENTIALS_DIRECTORY=str(tmp_path)
    )
    assert "not a path" in error.problem


@pytest.mark.parametrize("data", [b"", b"\n", b"a\nb", b"a\0b", b"caf\xc3\xa9", b"x" * 20_000])
def test_no_secret_files(data, tmp_path):
    (tmp_path / "token").write_bytes(data)
    error = refused(one_server(headers=f"{{A: {{file: {tmp_path}/token}}}}"))
    assert error.key == "servers[0].headers.A"
    assert "xxx" not in str(error)


def test_a_fifo_in_place_of_a_secret_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "token")
    error = refused(one_server(headers=f"{{A: {{file: {tmp_path}/token}}}}"))
    assert "not a regular file" in error.problem


# --- the document -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("trackers: {}", "c.yaml:1:1: trackers", "did you mean tracker?"),
        ("log:\n  lvel: info", "c.yaml:2:3: log.lvel", "did you mean level?"),
        ("log:\n  colour: x", "c.yaml:2:3: log.colour", "there are level, format"),
        ("a.b: 1", "c.yaml:1:1: 'a.b'", "is not a setting"),
        ("log: {level: info}\nlog: {}", "c.yaml:2:1: log", "twice, first in line 1"),
        ("log:\n  level: info\n  level: info", "c.yaml:3:3: log.level", "twice, first in line 2"),
        ("log: &x {level: info}", "c.yaml:1:6: log", "anchor"),
        ("log: *x", "c.yaml:1:6: log", "anchor"),
        ("log: {<<: {level: info}}", "c.yaml:1:7: log.'<<'", "is not a setting"),
        ("spool: !!python/name:os.system x", "c.yaml:1:8: spool", "tag"),
        ("spool: !!str 7", "c.yaml:1:8: spool", "tag"),
        ("1: x", "c.yaml:1:1: a key", "a number"),
        ("yes: x", "c.yaml:1:1: a key", "a boolean"),
        ("? [a]\n: x", "c.yaml:1:3: a key", "a list"),
        ("log: {? {a: b} : x}", "c.yaml:1:9: log: a key", "a mapping"),
        ("servers:\n- {name: a, name: b}", "c.yaml:2:13: servers[0].name", "twice"),
        ("- a", "c.yaml:1:1: must be", "a list"),
        ("7", "c.yaml:1:1: must be", "a number"),
        ("a: 1\n---\nb: 2", "c.yaml:2:1: holds", "more than one document"),
        ("log: {level: info", "c.yaml:1:18: is not valid YAML", ""),
        ("log:\n\tlevel: x", "c.yaml:2:1: is not valid YAML", ""),
        ("%YAML 9" * 2000, "c.yaml", "is not valid YAML"),
        ("a: b\nc: \x00", "c.yaml:2:4: holds a character", "'\\x00'"),
        ("a: \ud800", "c.yaml:1:4: holds a character", "'\\ud800'"),
        ("[" * 5000, "c.yaml:1:17: nests deeper", ""),
        ("- " * 5000, "c.yaml:1:33: nests deeper", ""),
        ("#" * 1_000_001, "c.yaml: is larger", ""),
    ],
)
def test_where_and_why(text, where, words):
    message = str(refused(text))
    assert message.startswith(where)
    assert words in message


def test_every_problem_is_reported_in_the_order_of_lines(tmp_path):
    path = tmp_path / "comfyd.yaml"
    path.write_text("log: {level: loud}\naudit: {interval: 5}\nspol: x\nhistory: {attempts: 0}\n")
    keys = [problem.key for problem in config.check(path)]
    assert keys == ["log.level", "audit.interval", "spol", "history.attempts"]
    assert str(config.check(path)[0]).startswith(f"{path}:1:14: log.level: must be one of debug")
    with pytest.raises(ConfigError, match=r":1:14: log\.level"):
        config.load(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"\xff", "not UTF-8 text at byte 0"), (b"#" * 4_000_010, "larger"), (None, "cannot be read")],
)
def test_no_files(data, words, tmp_path):
    path = tmp_path / "comfyd.yaml"
    if data is not None:
        path.write_bytes(data)
    [problem] = config.check(path)
    assert words in problem.problem
    assert str(problem).startswith(str(path))


def test_a_good_file(tmp_path):
    path = tmp_path / "comfyd.yaml"
    path.write_bytes(b"\xef\xbb\xbfspool: s\r\n")
    assert config.check(path) == []
    assert config.load(path).spool == tmp_path / "s"


KEYS = [
    "spool",
    "servers",
    "name",
    "url",
    "headers",
    "tracker",
    "ping_interval",
    "log",
    "file",
    "done",
]
VALUES = [
    "15s",
    "http://localhost",
    "null",
    "7",
    "auto",
    "*a",
    "&a",
    "!x",
    "~",
    "yes",
    "1:30",
    "\t",
]
YAMLISH = st.lists(
    st.sampled_from([*KEYS, *VALUES, *"{}[]:,-?|>'\"#%@`\n ", ": ", "\n- ", "\n  ", "---\n", "<<"])
    | st.text(max_size=3)
).map("".join)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=9)
    | st.sampled_from(VALUES),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
).map(lambda tree: yaml.safe_dump(tree, allow_unicode=True))  # fmt: skip


@given(text=YAMLISH | TREES | st.text(st.characters()))
def test_whatever_is_written_it_is_a_configuration_or_a_problem(text):
    try:
        found = config.parse(text, file=None, base=BASE, environ={})
    except ConfigError:
        return
    assert isinstance(found, Config)


# --- where it is ------------------------------------------------------------------------------


def test_the_command_line_wins_then_the_environment_then_here_then_the_system(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    system = tmp_path / "etc.yaml"
    monkeypatch.setattr(config, "SYSTEM_CONFIG", system)
    assert config.find_config(None, {}) is None
    assert config.find_config(None, {"COMFYD_CONFIG": ""}) is None
    system.touch()
    assert config.find_config(None, {}) == system
    Path("comfyd.yaml").touch()
    assert config.find_config(None, {}) == Path("comfyd.yaml")
    assert config.find_config(None, {"COMFYD_CONFIG": "/e"}) == Path("/e")
    assert config.find_config(Path("/c"), {"COMFYD_CONFIG": "/e"}) == Path("/c")


# --- restarts of a unit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unit", ["comfyui.service", "comfyui@gpu-1.service", "a_b.c:d.service", "comfyui@.service"]
)
def test_a_unit_of_systemd_may_be_named(tmp_path, unit):
    text = f"servers: [{{name: a, url: 'http://127.0.0.1:1', restart_unit: '{unit}'}}]"
    [server] = config.parse(text, file=None, base=tmp_path).servers
    assert (server.restart_unit, server.restart_interval_s) == (unit, 1800.0)


@pytest.mark.parametrize(
    "unit",
    [
        "comfyui", "--force.service", "-x.service", "a b.service", "a;b.service", "../a.service",
        "comfyui.service x", "comfyui.timer", ".service", "@x.service", "é.service", "",
        f"{'a' * 250}.service", "a.service\\n",
    ],
)  # fmt: skip
def test_nothing_else_is_taken_for_one(tmp_path, unit):
    text = f'servers: [{{name: a, url: "http://127.0.0.1:1", restart_unit: "{unit}"}}]'
    with pytest.raises(ConfigError, match="restart_unit"):
        config.parse(text, file=None, base=tmp_path)


def test_restarts_must_not_follow_each_other_too_closely(tmp_path):
    text = "servers: [{name: a, url: 'http://127.0.0.1:1', restart_interval: 1m}]"
    with pytest.raises(ConfigError, match="at least 3m"):
        config.parse(text, file=None, base=tmp_path)
