"""Settings: the environment, then a TOML file, as one checked and frozen value.

`load` reads the sources, and secrets again while a process runs; `model` defines what can be set,
`values` parses single values, `tokens` says what the access tokens allow.

`Settings` reads nothing by itself, so that tests and the demo are independent of the process's
environment: `load_settings` fills it.
"""

from tracker.settings.load import Loaded, Rotation, load_settings, read_settings
from tracker.settings.model import EndpointSettings, Settings, TokenSettings, WorkspaceSettings

__all__ = [
    "EndpointSettings",
    "Loaded",
    "Rotation",
    "Settings",
    "TokenSettings",
    "WorkspaceSettings",
    "load_settings",
    "read_settings",
]
