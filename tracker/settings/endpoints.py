"""An endpoint of the settings, as what sends to it takes it."""

from tracker.delivering.endpoint_client import Endpoint
from tracker.settings.model import EndpointSettings
from tracker.store.queries.endpoints import EndpointConfig


def endpoint_of(configured: EndpointSettings) -> Endpoint:
    """The endpoint with its secrets in clear."""
    return Endpoint(
        config=EndpointConfig(
            endpoint_id=configured.id,
            url=configured.shown_url,
            events=configured.events,
            filter=configured.filter,
        ),
        url=configured.url,
        secrets=tuple(secret.get_secret_value() for secret in configured.secrets),
        allow_private=configured.allow_private,
    )
