"""What commands read besides their options: secret files, URLs, and the folder for state."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from gateway_queue_sync.environment import public_url, read_secret, state_folder


def test_a_secret_is_read_without_what_is_around_it(tmp_path):
    file = tmp_path / "secret"
    file.write_text(" hunter2\n")
    file.chmod(0o600)
    assert read_secret(str(file), "--secret-file") == "hunter2"


def test_a_secret_that_all_may_read_is_warned_about(tmp_path, caplog):
    file = tmp_path / "secret"
    file.write_text("hunter2")
    file.chmod(0o604)
    with caplog.at_level(logging.WARNING):
        assert read_secret(str(file), "--secret-file") == "hunter2"
    assert "can be read by every user" in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"\n", ValueError, "empty"),
        (b"\xff", ValueError, "not text"),
        (None, OSError, "^--secret-file .*: No such file"),
    ],
)
def test_a_secret_that_cannot_be_read_is_named(tmp_path, content, error, says):
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=says):
        read_secret(str(file), "--secret-file")


@pytest.mark.parametrize("url", ["foo", "localhost:6379", "http://localhost", "user:x@host"])
def test_a_url_of_no_server_is_explained(url):
    with pytest.raises(
        ValueError, match=r"--redis must be a URL such as redis://host:6379/0"
    ) as caught:
        public_url(url)
    assert (repr(url) in str(caught.value)) == ("@" not in url)  # it may be a password


@pytest.mark.parametrize("url", ["redis://host:6379/0", "rediss://user@host", "unix:///s?db=1"])
def test_a_url_without_a_password_may_be_on_a_command_line(url):
    assert public_url(url) == url


@pytest.mark.parametrize(
    "url", ["redis://:hunter2@host", "redis://h?password=hunter2", "redis://a:hunter2@[h"]
)
def test_a_url_with_a_password_may_not(url):
    with pytest.raises(ValueError, match="redis-file") as refused:
        public_url(url)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {"STATE_DIRECTORY": "/a:/b"}, "/a"),
        ("linux", {"XDG_STATE_HOME": "/x"}, "/x/gateway-queue-sync"),
        ("linux", {}, "~/.local/state/gateway-queue-sync"),
        ("darwin", {}, "~/Library/Application Support/gateway-queue-sync"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/gateway-queue-sync"),
    ],
)
def test_each_platform_has_its_folder_for_state(monkeypatch, platform, environment, folder):
    monkeypatch.setattr(sys, "platform", platform)
    found, _ = state_folder(environment)
    assert found == Path(folder).expanduser()
