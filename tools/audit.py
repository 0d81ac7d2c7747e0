"""`python -m tools.audit`: whether known vulnerabilities are in what the lock files install.

uv asks its vulnerability service for every locked release; what it reads is a lock file of its own
kind, written here from ours, so that nothing is resolved and no registry is asked. Exit status 0
where all releases were looked up and none is known to be vulnerable, 1 where one is, 2 where they
could not be looked up: that is no pass. Further options go to `uv audit`.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

LOCKED: Final = ("requirements/dev.txt", "requirements/uv.txt", "requirements/build.txt")
"""All that is installed here, or into an image; the releases of requirements/runtime.txt are among
them."""
_SOURCE: Final = '{ registry = "." }'
_PIN: Final = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)


def main(options: list[str]) -> int:
    """Audit what is locked, and say how that went."""
    if importlib.util.find_spec("uv") is None:
        print("NOT CHECKED: uv is not installed for this Python.", file=sys.stderr)
        return 2
    root = Path(__file__).parents[1]
    pins = {pin for name in LOCKED for pin in _PIN.findall((root / name).read_text("utf-8"))}
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), sorted(pins))
        command = [sys.executable, "-m", "uv", "audit", "--frozen", "--no-config"]
        command += ["--preview-features", "audit-command", "--project", folder, *options]
        status = subprocess.run(command, check=False).returncode  # noqa: S603 - our own words
    if status == 0:
        print(f"{len(pins)} locked releases, and no vulnerability of them is known.")
    elif status == 1:
        print("Vulnerable releases are locked: make lock UPGRADE=--upgrade, then test.")
    else:
        print("NOT CHECKED: uv could not look them up from here.", file=sys.stderr)
    return min(status, 2)


def _write(folder: Path, pins: list[tuple[str, str]]) -> None:
    """A project that depends on all of the pins, and its lock."""
    names = "".join(f'  "{name}=={version}",\n' for name, version in pins)
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "audited"\nversion = "0"\nrequires-python = ">=3.11"\n'
        f"dependencies = [\n{names}]\n",
        encoding="utf-8",
    )
    named = "".join(
        f'  {{ name = "{name}", version = "{version}", source = {_SOURCE} }},\n'
        for name, version in pins
    )
    packages = "".join(
        f'[[package]]\nname = "{name}"\nversion = "{version}"\nsource = {_SOURCE}\n\n'
        for name, version in pins
    )
    (folder / "uv.lock").write_text(
        f'version = 1\nrequires-python = ">=3.11"\n\n{packages}[[package]]\nname = "audited"\n'
        f'version = "0"\nsource = {{ virtual = "." }}\ndependencies = [\n{named}]\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
