"""Addresses of chat servers, and which key goes where."""

from __future__ import annotations

import pytest

from mpa_edge.chat_address import api_key, parse_spec
from mpa_edge.chat_vlm import ChatVlm
from mpa_edge.errors import InputError

KEY = "sk-secret-0123456789"


@pytest.mark.parametrize(
    "spec",
    [
        "http://user:pass-word@host/v1",
        "http://user:pass/word@host/v1",
        "https://user:pass-word@/v1#m",
        "http://host/v1?key=pass-word#m",
    ],
)
def test_secrets_in_an_address_are_refused_and_not_repeated(spec: str) -> None:
    for open_it in (parse_spec, ChatVlm.load, lambda one: ChatVlm(one, "m")):
        with pytest.raises(InputError) as caught:
            open_it(spec)
        assert "word" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize("spec", ["http://", "http:///v1", "http://host:port/v1", "http://[::1/v1", "ftp://host/v1"])
def test_an_address_without_a_host_says_how_one_looks(spec: str) -> None:
    with pytest.raises(InputError, match="http://localhost:8000/v1#MODEL"):
        parse_spec(spec)


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://api.openai.com/v1", "openais"),
        ("https://eu.api.openai.com/v1", "openais"),
        ("http://api.openai.com/v1", ""),
        ("https://notopenai.com/v1", ""),
        ("https://openai.com.example.org/v1", ""),
        ("http://localhost:8000/v1", ""),
    ],
)
def test_openais_key_goes_to_openai_only(url: str, sent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "openais")
    assert api_key(url) == sent
    monkeypatch.setenv("MPA_EDGE_API_KEY", "mine")  # comes first
    assert api_key(url) == "mine"
    monkeypatch.setenv("MPA_EDGE_API_KEY", "")  # keeps the other one at home
    assert api_key(url) == ""


def test_a_key_that_travels_unencrypted_gets_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api_key("http://203.0.113.5/v1")  # there is none
    monkeypatch.setenv("MPA_EDGE_API_KEY", KEY)
    for url in ("https://203.0.113.5/v1", "http://localhost/v1", "http://127.0.0.1:8000/v1", "http://[::1]:8000/v1"):
        api_key(url)
    assert not capsys.readouterr().err
    api_key("http://203.0.113.5:8000/v1")
    told = capsys.readouterr().err
    assert "MPA_EDGE_API_KEY goes to 203.0.113.5 unencrypted" in told
    assert KEY not in told
