"""The tables `[[endpoints]]` of the settings."""

import base64
from pathlib import Path

import pytest

from tracker.core.errors import SettingsError
from tracker.core.events import EventType
from tracker.services import open_services
from tracker.settings import Rotation, Settings, load_settings, read_settings

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OTHER = "whsec_" + base64.b64encode(bytes(range(1, 33))).decode()
WHOLE = f"""
[[endpoints]]
id = "shop"
url = "https://shop.example/hooks?key=1234-abc"
secrets = ["env:SHOP_SECRET", "{OTHER}"]
events = ["run.settled", "run.cost_changed"]
workspace_id = "ws_1"
technique_id = "tech_1"
status = "completed"
tag = "campaign=spring"
"""


def load(folder: Path, text: str) -> Settings:
    """The settings of a file with this text."""
    (folder / "tracker.toml").write_text(text)
    environ = {"TRACKER_CONFIG": str(folder / "tracker.toml"), "SHOP_SECRET": SECRET}
    return load_settings(environ)


def test_an_endpoint_is_read_and_its_secrets_stay_secret(tmp_path: Path) -> None:
    """Events and filters are those of the file; secrets and the query of the URL are redacted."""
    settings = load(tmp_path, WHOLE)
    (shop,) = settings.endpoints
    assert shop.events == (EventType.SETTLED, EventType.COST_CHANGED)
    assert shop.filter.to_json() == {
        "workspace_id": "ws_1",
        "technique_id": "tech_1",
        "status": "completed",
        "tag": "campaign=spring",
    }
    assert [secret.get_secret_value() for secret in shop.secrets] == [SECRET, OTHER]
    assert {SECRET, OTHER, "key=1234-abc"} <= settings.secret_values
    assert shop.shown_url == "https://shop.example/hooks?…"
    for secret in (SECRET, OTHER, "1234-abc"):
        assert secret not in repr(settings)


def test_by_default_settled_runs_are_sent(tmp_path: Path) -> None:
    """Only an id, an address and a secret are needed."""
    text = f'[[endpoints]]\nid = "a"\nurl = "https://a.example"\nsecrets = "{SECRET}"'
    (endpoint,) = load(tmp_path, text).endpoints
    assert endpoint.events == (EventType.SETTLED,)
    assert endpoint.filter.to_json() == {}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"id": "a b"}, "endpoints[0].id in {path} must be 1 to 64 of"),
        ({"url": "ftp://a.example"}, "endpoints[0].url in {path} must begin with https://"),
        ({"url": "http://a.example"}, "endpoint a: url must begin with https://"),
        ({"url": "https://me:pw@a.example"}, "must not hold a user name or a password"),
        ({"url": "https://a.example/#x"}, "must not hold a fragment"),
        ({"url": "a.example"}, "must be an address such as https://"),
        ({"secrets": "whsec_short"}, "endpoints[0].secrets[0] in {path} must be whsec_ and"),
        ({"secrets": SECRET.removeprefix("whsec_")}, "must be whsec_ and the base64 of"),
        ({"secrets": []}, "endpoints[0].secrets in {path} must not be empty"),
        ({"events": ["run.ended"]}, "endpoints[0].events[0] in {path} must be 'run.settled'"),
        ({"events": []}, "endpoints[0].events in {path} must not be empty"),
        ({"technique_id": "icon-pack"}, "must be a technique's id"),
        ({"tag": "spring"}, "is not KEY=VALUE"),
        ({"private": True}, "endpoints[0].private in {path}: unknown key"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_fault_is_named_with_its_place(
    change: dict[str, object], fault: str, tmp_path: Path
) -> None:
    """The message names the key and what it must be, and holds no secret."""
    values = {"id": "a", "url": "https://a.example", "secrets": SECRET} | change
    lines = [
        f"{name} = {str(value).lower() if value is True else repr(value)}"
        for name, value in values.items()
    ]
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, "[[endpoints]]\n" + "\n".join(lines))
    assert fault.format(path=tmp_path / "tracker.toml") in str(caught.value)
    assert SECRET not in str(caught.value)


def test_an_invalid_entry_is_one_fault(tmp_path: Path) -> None:
    """A list whose only entry is invalid is not called empty as well."""
    text = f'[[endpoints]]\nid = "a"\nurl = "https://a.example"\nsecrets = "{SECRET}"'
    text += '\nevents = ["run.ended"]'
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    assert "must be 'run.settled'" in str(caught.value)
    assert "endpoints[0].events in" not in str(caught.value)


def test_ids_differ(tmp_path: Path) -> None:
    """Two endpoints of one id are refused: messages belong to an id."""
    with pytest.raises(SettingsError, match=r"two .* have the id shop"):
        load(tmp_path, WHOLE + WHOLE)


def test_secrets_rotate_without_a_restart(tmp_path: Path) -> None:
    """New secrets are in force when their file has changed; another address needs a restart."""
    config, secret = tmp_path / "tracker.toml", tmp_path / "secret"
    secret.write_text(SECRET)
    text = '[[endpoints]]\nid = "a"\nurl = "https://a.example"\nsecrets = "file:secret"'
    config.write_text(text)
    environ = {"TRACKER_CONFIG": str(config)}
    loaded = read_settings(environ)
    rotation = Rotation(loaded.settings, loaded, lambda: read_settings(environ))
    secret.write_text(f"{OTHER} {SECRET}")
    config.write_text(text.replace("a.example", "b.example"))
    assert rotation.check()
    (endpoint,) = rotation.settings.endpoints
    assert [one.get_secret_value() for one in endpoint.secrets] == [OTHER, SECRET]
    assert endpoint.url == "https://a.example"


async def test_an_endpoint_gets_its_new_secret_even_if_a_new_key_is_refused(tmp_path: Path) -> None:
    """A mistake in one secret keeps no other from being in force."""
    config, secret, key = tmp_path / "tracker.toml", tmp_path / "secret", tmp_path / "key"
    secret.write_text(SECRET)
    key.write_text("sk_1")
    config.write_text(
        'flora_api_key = "file:key"\nflora_workspace_id = "ws_1"\n'
        f'tracker_database_url = "sqlite:///{tmp_path}/tracker.db"\n'
        '[[endpoints]]\nid = "a"\nurl = "https://a.example"\nsecrets = "file:secret"'
    )
    environ = {"TRACKER_CONFIG": str(config)}
    loaded = read_settings(environ)
    rotation = Rotation(loaded.settings, loaded, lambda: read_settings(environ))
    async with open_services(rotation) as services:
        key.write_text("k" * 501)  # longer than the client takes
        secret.write_text(OTHER)
        rotation.check()
        assert services.webhooks._endpoints["a"].secrets == (OTHER,)
