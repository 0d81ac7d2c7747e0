"""Rotation of secrets without a restart.

Access tokens, API keys and signing secrets that come from files (`"file:PATH"`, or the file of
`TRACKER_CONFIG` itself) are reloaded when a file changes. All other settings need a restart.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

from tracker.core.errors import SettingsError
from tracker.core.log import get_logger
from tracker.core.waiting import cancel, repeat
from tracker.settings.load import FileState, Loaded, file_state
from tracker.settings.model import Settings, WorkspaceSettings

CHECK_SECONDS: Final = 1.0
"""How often a service checks its files. A refused secret triggers a check at once."""

log = get_logger(__name__)


class Rotation:
    """The `settings` with the current secrets; `tokens` are the access tokens among them, `unknown`
    what was said of unknown settings at the start.

    Where settings come from files, `loaded` has the files and `read` reads them again. A check
    costs a `stat` for each file.
    """

    def __init__(
        self,
        settings: Settings,
        loaded: Loaded | None = None,
        read: Callable[[], Loaded] | None = None,
    ) -> None:
        self.settings = settings
        self.tokens = settings.access_tokens
        self.unknown = loaded.unknown if loaded else ()
        self._read = read
        self._files: dict[Path, FileState] = loaded.files if loaded else {}
        self._failure: str | None = None
        """Why the last reload failed."""
        self.stale: str | None = None
        """Why settings in files are not in force in this process, if any are not."""
        self._followers: list[Callable[[Settings], None]] = []

    def follow(self, follower: Callable[[Settings], None]) -> None:
        """Call `follower` with the settings now and after each change."""
        self._followers.append(follower)
        follower(self.settings)

    def check(self) -> bool:
        """Reload if a file has changed; return whether a secret is new."""
        changed = any(file_state(path) != state for path, state in self._files.items())
        return changed and self.reload()

    def check_or_retry(self) -> bool:
        """As `check`, and reload also if the last reload failed; return whether a secret is new.

        The fix of a failure may be in a file that was never read, such as one that the settings
        named before it was there. Then each call reads all files, until they can be used.
        """
        return self.check() if self._failure is None else self.reload()

    def reload(self) -> bool:
        """Read all files again; return whether a secret is new.

        Unreadable files and invalid settings are logged and change nothing.
        """
        if self._read is None:
            return False
        now = {path: file_state(path) for path in self._files}
        try:
            for path in self._files:
                if path.exists() and not path.is_file():
                    raise SettingsError(f"{path} is a pipe or a device, which cannot be read again")
            loaded = self._read()
            rotated = _with_secrets_of(self.settings, loaded.settings)
        except SettingsError as error:
            self._files = now
            if str(error) != self._failure:
                self._failure = self.stale = str(error)
                log.error("settings.not_reloaded", reason=self._failure)
            return False
        self._files, self._failure, self.stale = loaded.files, None, None
        names = Settings.model_fields
        if left := [one for one in names if getattr(rotated, one) != getattr(loaded.settings, one)]:
            log.warning("settings.restart_needed", settings=left)
            self.stale = f"a restart is needed for {', '.join(left)}"
        new = [one for one in names if getattr(rotated, one) != getattr(self.settings, one)]
        if not new:
            return False
        self.settings = rotated
        self.tokens = rotated.access_tokens
        for follower in self._followers:
            try:
                follower(rotated)
            except SettingsError as error:  # one unusable secret must not block the others
                self.stale = str(error)
                log.error("settings.not_reloaded", reason=str(error))
        log.info(
            "settings.reloaded",
            settings=new,
            tokens=len(rotated.access_tokens),
            signing_secrets=sum(len(one.clear_secrets) for one in rotated.all_workspaces),
        )
        return True

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Check once a second until the block ends, if there are files."""
        if not self._files:
            yield
            return
        task = asyncio.create_task(repeat("settings", self._check_next), name="rotation")
        try:
            yield
        finally:
            await cancel(task)

    @contextmanager
    def reloaded_on_hangup(self) -> Iterator[None]:
        """Reload on SIGHUP until the block ends; for a process that is the tracker's own."""
        if not hasattr(signal, "SIGHUP"):
            yield
            return
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # no reload while the process ends

    async def _check_next(self) -> None:
        await asyncio.sleep(CHECK_SECONDS)
        self.check_or_retry()


def _with_secrets_of(old: Settings, new: Settings) -> Settings:
    """`old` with the tokens, keys and signing secrets of `new`; workspaces and endpoints match by
    id.

    A new workspace, a first key, and the removal of a workspace's last signing secret need a
    restart: the latter also happens where a file is read while it is written. Raises
    `SettingsError` where no token is left: the service would be open to everyone, or to no one.
    """
    if len(old.access_tokens) and not len(new.access_tokens):
        raise SettingsError(
            "no token is set any more (TRACKER_API_TOKEN, [[tokens]]): the old ones stay valid"
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
    signing = {endpoint.id: endpoint.secrets for endpoint in new.endpoints}
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
            "endpoints": tuple(
                one.model_copy(update={"secrets": signing.get(one.id, one.secrets)})
                for one in old.endpoints
            ),
        }
    )
