"""Which hosts are taken for this machine."""

import pytest

from tracker.core.net import is_loopback


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST.",
        "app.localhost",
        "127.0.0.1",
        "127.8.9.1",
        "::1",
        "[::1]",
        "::ffff:127.0.0.1",
        "::1%lo",
    ],
)
def test_this_machine(host: str) -> None:
    """Names and addresses that never leave the machine are loopback."""
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "example.org",
        "localhost.example.org",
        "127.0.0.1.example.org",
        "0.0.0.0",
        "::",
        "10.0.0.1",
        "169.254.1.1",
        "::ffff:10.0.0.1",
        "127.1",
        "127.0.0.1%example.org",
        "127.0.0.1%",
        "2130706433",
        "notlocalhost",
    ],
)
def test_any_other(host: str) -> None:
    """Everything else is not, however it is spelt: what cannot be told is not loopback."""
    assert not is_loopback(host)
