"""Settings: the environment, over a TOML file, becomes one checked and frozen value.

`load` says where values come from, `model` what can be set, `values` and `cron` how one value
reads, `rotation` which secrets are in force while a process runs.

`Settings` is a plain value that gathers nothing by itself, so that a test or the demo says
all of it and nothing of the process's environment leaks in; that is why it is a pydantic model, fed
by `load_settings`.
"""

from tracker.core.net import CALLBACK_PATH
from tracker.settings.load import Loaded, load_settings, read_settings
from tracker.settings.model import Settings, TokenSettings, WorkspaceSettings
from tracker.settings.rotation import Rotation

__all__ = [
    "CALLBACK_PATH",
    "Loaded",
    "Rotation",
    "Settings",
    "TokenSettings",
    "WorkspaceSettings",
    "load_settings",
    "read_settings",
]
