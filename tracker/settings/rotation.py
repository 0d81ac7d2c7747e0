"""Secrets in force: read again when a file that they were read from changes, without a restart.

Tokens, API keys and signing secrets change while a service runs: they are rotated. Where they stand
in files (`"file:PATH"`, or in the file of `TRACKER_CONFIG` itself) the service notices, and goes on
with the new ones. Every other setting stays as it was when the process began.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

from tracker.core.errors import SettingsError
from tracker.settings.load import FileState, Loaded, file_state
from tracker.settings.model import Settings, WorkspaceSettings

CHECK_SECONDS: Final = 1.0
"""How often a service looks whether its files have changed. What fails for want of a new secret has
it looked at once."""

log = structlog.get_logger(__name__)


class Rotation:
    """The settings with the secrets that are in force, and `tokens`, the access tokens among them.

    `settings` are at first those that the process begins with. Where they were read from files,
    `loaded` says so and `read` reads them anew; a check costs a `stat` for each file.
    """

    def __init__(
        self,
        settings: Settings,
        loaded: Loaded | None = None,
        read: Callable[[], Loaded] | None = None,
    ) -> None:
        self.settings = settings
        self.tokens = settings.access_tokens
        self._read = read
        self._files: dict[Path, FileState] = loaded.files if loaded else {}
        self._failure: str | None = None
        """Why the files could not be taken over when they were last read."""
        self._followers: list[Callable[[Settings], None]] = []

    def follow(self, follower: Callable[[Settings], None]) -> None:
        """Call `follower` with the settings now, and again after each change."""
        self._followers.append(follower)
        follower(self.settings)

    def check(self) -> bool:
        """Take over what has changed in the files; whether anything of it is new."""
        changed = any(file_state(path) != state for path, state in self._files.items())
        return changed and self.reload()

    def reload(self) -> bool:
        """Read all files again, changed or not; whether anything of it is new.

        What cannot be read or is not valid leaves everything as it is, and is logged.
        """
        if self._read is None:
            return False
        now = {path: file_state(path) for path in self._files}
        try:
            _refuse_streams(self._files)
            loaded = self._read()
            rotated = _with_secrets_of(self.settings, loaded.settings)
        except SettingsError as error:
            self._files = now
            if str(error) != self._failure:
                self._failure = str(error)
                log.error("settings.not_reloaded", reason=self._failure)
            return False
        self._files, self._failure = loaded.files, None
        if left := _need_a_restart(rotated, loaded.settings):
            log.warning("settings.restart_needed", settings=left)
        if rotated == self.settings:
            return False
        self.settings = rotated
        self.tokens = rotated.access_tokens
        for follower in self._followers:
            try:
                follower(rotated)
            except SettingsError as error:  # one secret that cannot be used holds up no other
                log.error("settings.not_reloaded", reason=str(error))
        log.info("settings.reloaded")
        return True

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Check once a second, and read all anew on SIGHUP, for as long as the block lasts."""
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(self._watch(), name="rotation")
        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, self.reload)
        try:
            yield
        finally:
            if hasattr(signal, "SIGHUP"):
                loop.remove_signal_handler(signal.SIGHUP)
                signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it ends: nothing is to be reloaded
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                # What was wrong may be put right in a file that was never read.
                self.check() if self._failure is None else self.reload()
            except Exception:
                log.exception("settings.not_reloaded")


def _refuse_streams(files: Iterable[Path]) -> None:
    """Raise `SettingsError` where one of the files can be read only once."""
    for path in files:
        if path.exists() and not path.is_file():
            raise SettingsError(f"{path} is a pipe or a device, which cannot be read again")


def _with_secrets_of(old: Settings, new: Settings) -> Settings:
    """`old` with the tokens, keys and signing secrets of `new`.

    Workspaces are matched by their ids. A workspace that is new, or had no key before, needs a
    restart; so does one that is to have no signing secret any more, as where a file is read while
    it is being written. Raises `SettingsError` where no token is left: the service would be open to
    whoever reaches it, or closed to everybody.
    """
    if len(old.access_tokens) and not len(new.access_tokens):
        raise SettingsError(
            "no token is set any more (TRACKER_API_TOKEN, [[tokens]]): those before stay in force"
        )

    def rotated(before: WorkspaceSettings, after: WorkspaceSettings) -> WorkspaceSettings:
        has_client = before.api_key is not None and after.api_key is not None
        return before.model_copy(
            update={
                "api_key": after.api_key if has_client else before.api_key,
                "webhook_secrets": after.webhook_secrets or before.webhook_secrets,
            }
        )

    now = {workspace.id: workspace for workspace in new.workspaces}
    top = rotated(old.top_workspace, new.top_workspace)
    return old.model_copy(
        update={
            "flora_api_key": top.api_key,
            "flora_webhook_secret": top.webhook_secrets,
            "tracker_api_token": new.tracker_api_token,
            "tokens": new.tokens,
            "workspaces": tuple(
                rotated(workspace, now.get(workspace.id, workspace)) for workspace in old.workspaces
            ),
        }
    )


def _need_a_restart(ours: Settings, new: Settings) -> list[str]:
    """The names of what stands otherwise in the files now and does not count yet."""
    return [name for name in Settings.model_fields if getattr(ours, name) != getattr(new, name)]
