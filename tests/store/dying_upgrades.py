"""Upgrades that are killed: the first database is brought up to date whole, each of the others
until SIGKILL strikes, at statements that lie evenly in the whole.

Run as `python -m tests.store.dying_upgrades URL…`.
"""

import asyncio
import os
import signal
import sys
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from tracker.store import migrate


def upgraded(url: str, die_before: int) -> int:
    """Upgrade in this process, which dies before that statement; how many statements it took."""
    statements = 0

    def count(*_: Any) -> None:
        nonlocal statements
        statements += 1
        if statements == die_before:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", count)
    asyncio.run(migrate.upgrade(url))
    event.remove(Engine, "before_cursor_execute", count)
    return statements


def forked(url: str, die_before: int) -> tuple[int, int]:
    """Upgrade in a child: the status that it ended with, and how many statements it took."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(sender, str(upgraded(url, die_before)).encode())
        os._exit(0)
    os.close(sender)
    _, status = os.waitpid(child, 0)
    told = os.read(receiver, 20)
    os.close(receiver)
    return status, int(told or b"0")


def main(whole: str, *others: str) -> None:
    """See the module."""
    _, statements = forked(whole, die_before=0)
    for number, url in enumerate(others, start=1):
        status, _ = forked(url, die_before=statements * number // (len(others) + 1))
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"the upgrade of {url} was not killed")


if __name__ == "__main__":
    main(*sys.argv[1:])
