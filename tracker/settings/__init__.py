"""Settings: the environment, then a TOML file, as one checked and frozen value.

`load` reads the sources, `model` defines what can be set, `values` parses single values, `tokens`
says what the access tokens allow, `rotation` reloads secrets while a process runs.

`Settings` reads nothing by itself, so that tests and the demo are independent of the process's
environment: `load_settings` fills it.
"""

from tracker.settings.load import Loaded, load_settings, read_settings
from tracker.settings.model import EndpointSettings, Settings, TokenSettings, WorkspaceSettings
from tracker.settings.rotation import Rotation

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
