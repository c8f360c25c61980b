"""Prometheus' web configuration file: what is taken, and what is refused with a sentence."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trustme
import yaml

from comfyd import config
from comfyd.config import Secrets
from comfyd.config.web import WebConfig
from comfyd.errors import ConfigError

HASH = "$2y$10$mDwo.lAisC94iLAyP81MCesa29IzH37oigHC/42V2pdJlUprsJPze"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("a.example").private_key_pem.write_to_path(tmp_path / "other.pem")
    cert = authority.issue_cert("comfyd.example")
    cert.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    return tmp_path


def read(folder: Path, text: str) -> WebConfig:
    (folder / "web.yml").write_text(text)
    main = folder / "comfyd.yaml"
    main.write_text("metrics:\n  web_config: web.yml\n")
    made = config.load(main).metrics.web_config
    assert made is not None
    return made


def refused(folder: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(folder, text)
    return caught.value


def tls(**more: str) -> str:
    settings = {"cert_file": "both.pem", "key_file": "both.pem", **more}
    return yaml.safe_dump({"tls_server_config": settings})


def test_nothing_in_it_protects_nothing(folder):
    for text in ("", "# nothing yet\n", "basic_auth_users: {}\n", "tls_server_config: null\n"):
        found = read(folder, text)
        assert (found.tls, found.context, dict(found.users)) == (None, None, {})


def test_all_that_is_supported(folder):
    text = yaml.safe_dump(
        {
            "tls_server_config": {
                "cert_file": "both.pem",
                "key_file": str(folder / "both.pem"),
                "client_auth_type": "RequireAndVerifyClientCert",
                "client_ca_file": "ca.pem",
                "min_version": "TLS13",
                "max_version": "TLS13",
            },
            "http_server_config": {
                "http2": False,
                "headers": {"X-Frame-Options": "deny", "X-Content-Type-Options": ""},
            },
            "basic_auth_users": {"alice": HASH, "bob": HASH.replace("$2y$", "$2b$")},
        }
    )
    found = read(folder, text)
    assert found.context is not None
    assert found.context.verify_mode is ssl.CERT_REQUIRED
    assert found.context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert dict(found.headers) == {"X-Frame-Options": "deny", "X-Content-Type-Options": ""}
    assert found.users["alice"].reveal() == HASH
    assert HASH not in repr(found)


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("tls_config: {}", "web.yml:1:1: tls_config", "did you mean tls_server_config?"),
        ("a: [", "web.yml:1:5", "is not valid YAML"),
        ("- a", "web.yml:1:1", "must be a mapping of settings"),
        (tls(cert_file="no.pem"), "web.yml:2:14: tls_server_config.cert_file", "that exists"),
        (tls(key_file="other.pem"), "tls_server_config.cert_file", "does not fit"),
        (tls(cert_file="other.pem"), "tls_server_config.cert_file", "does not fit"),
        ("tls_server_config: {cert_file: both.pem}", "tls_server_config.key_file", "is missing"),
        (tls(min_version="TLS10"), "tls_server_config.min_version", "TLS10 is broken"),
        (tls(min_version="TLS14"), "tls_server_config.min_version", "one of TLS12, TLS13"),
        (tls(min_version="TLS13", max_version="TLS12"), "min_version", "above max_version"),
        (tls(client_ca_file="ca.pem"), "client_auth_type", "need each other"),
        (tls(client_auth_type="RequireAndVerifyClientCert"), "client_auth_type", "need each"),
        (tls(client_auth_type="RequireAnyClientCert"), "client_auth_type", "verifies nothing"),
        (tls(client_auth_type="Any"), "client_auth_type", "one of NoClientCert"),
        (tls(cipher_suites="x"), "cipher_suites", "is not supported here"),
        (tls(client_allowed_sans="x"), "client_allowed_sans", "is not supported here"),
        (tls(cert="PEM"), "tls_server_config.cert", "put it in a file"),
        ("rate_limit: {interval: 1s, burst: 20}", "rate_limit", "is not supported here"),
        ("http_server_config: {http3: true}", "http_server_config.http3", "is not a setting"),
        ("http_server_config: {headers: {Server: a}}", "headers.Server", "is not one of"),
        ('http_server_config: {headers: {X-Frame-Options: "a\\nb"}}', "X-Frame", "not a value"),
        ("basic_auth_users: [a]", "basic_auth_users", "must be a mapping"),
        ("basic_auth_users: {alice: fox}", "1:27: basic_auth_users.alice", "be a bcrypt hash"),
        (f"basic_auth_users: {{'a:b': {HASH}}}", "basic_auth_users.'a:b'", "without a colon"),
        (
            f"basic_auth_users: {{a: {HASH.replace('$10$', '$31$')}}}",
            "basic_auth_users.a",
            "has cost 31",
        ),
    ],
)
def test_what_is_refused_and_where(folder, text, place, problem):
    error = refused(folder, text)
    assert place in str(error)
    assert problem in error.problem
    assert str(folder / "web.yml") in str(error)
    assert "fox" not in str(error)  # it may be somebody's password


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(folder):
    from cryptography.hazmat.primitives import serialization as form

    key = form.load_pem_private_key((folder / "other.pem").read_bytes(), None)
    locked = key.private_bytes(
        form.Encoding.PEM, form.PrivateFormat.PKCS8, form.BestAvailableEncryption(b"fox")
    )
    (folder / "locked.pem").write_bytes(locked)
    assert "cannot be used" in refused(folder, tls(key_file="locked.pem")).problem


def test_all_problems_are_found_in_one_run(folder):
    (folder / "web.yml").write_text("a: 1\nb: 2\n")
    main = folder / "comfyd.yaml"
    main.write_text("metrics: {web_config: web.yml, x: 1}\n")
    assert [problem.key for problem in config.check(main)] == ["a", "metrics.x", "b"]


def test_it_is_not_read_by_who_does_not_listen(folder):
    main = folder / "comfyd.yaml"
    main.write_text("metrics: {web_config: nowhere.yml}\n")
    assert config.load(main, Secrets.NONE).metrics.web_config == WebConfig(
        path=folder / "nowhere.yml"
    )


def test_renewed_certificates_are_a_change(folder):
    before = read(folder, tls())
    assert read(folder, tls()) == before
    cert = trustme.CA().issue_cert("comfyd.example")
    cert.private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    assert read(folder, tls()) != before
