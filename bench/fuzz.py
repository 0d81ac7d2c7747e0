"""`python -m bench.fuzz`: looks for input that breaks a promise, led by the code it reaches.

::

    python -m bench.fuzz --seconds 600 --target callback

The targets, their promises and the inputs to begin with are those of `tests/hostile`. Atheris (the
fuzzer of LLVM, for Python) grows the inputs: one that reaches code which none reached before is
kept and varied further. What breaks a promise is written to `--found` and ends its target; it
belongs into the corpus, under a name. Each target runs in a process of its own, on a database of
its own. Exit status 1 where something was found.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from tests.hostile.inputs import corpus

TARGETS: Final = ("callback", "signature", "answers", "api", "file", "sheet", "settings")
LONGEST: Final = 8192
"""Bytes of an input: longer ones reach nothing new and take long."""
WORDS: Final = (
    *("run.completed", "run.failed", '"status"', '"completed"', '"failed"', '"running"', '"data"'),
    *('"run_id"', '"workspace_id"', '"ws_1"', '"id"', '"type"', "\\\\u0000", "\\\\ud800", "NaN"),
    *("flora-signature: ", "flora-webhook-id: ", "t=<now>", "v1=<0>", "v1=<1>", "<0:1780315200>"),
    *("GET /", "POST /api/runs", "/runs/", "/deliveries/", "/check", "/replay", "?cursor=", "%00"),
    *("hx-request: true", "hx-current-url: http://", "host: ", "cookie: tracker_session=", "env:"),
    *("csv", "jsonl", "[[workspaces]]", "api_key = ", "history", "generations", "technique", "%2f"),
    *("HTTP/1.1 200 OK", "HTTP/1.1 206 P", "HTTP/1.1 302 F", "content-length: ", "content-range: "),
    *("etag: ", "last-modified: ", "location: ", "content-encoding: gzip", "bytes 4-8/9", "===="),
    *("refusal 429", "wait", "retry-after: ", '"outputs"', '"url"', '"error_message"', "1e400"),
)
"""What the inputs are made of, so that a fuzzer need not guess them letter by letter."""


def main() -> int:
    """Fuzz the targets one after the other and print a line for each."""
    asked = _arguments()
    if asked.inside:
        _fuzz(asked.inside, asked.libfuzzer)
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: pip install atheris (on Linux)", file=sys.stderr)
        return 2
    figures: dict[str, dict[str, Any]] = {}
    print(f"{'target':<10} {'inputs':>9} {'per s':>7} {'reached':>8} {'kept':>6}  result")
    for target in TARGETS if asked.target == "all" else (asked.target,):
        figures[target] = one = _run(target, asked.seconds, asked.found)
        print(
            f"{target:<10} {one['inputs']:>9} {one['per_second']:>7} {one['reached']:>8} "
            f"{one['kept']:>6}  {one['found'] or 'nothing found'}"
        )
    if asked.json:
        asked.json.write_text(json.dumps({"soak": "fuzz", "figures": figures}, indent=2) + "\n")
    return 1 if any(one["found"] for one in figures.values()) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", choices=(*TARGETS, "all"), default="all")
    parser.add_argument("--found", type=Path, default=Path("found"), help="folder for what breaks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--inside", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("libfuzzer", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(target: str, seconds: int, found: Path) -> dict[str, Any]:
    """Fuzz one target in a process of its own; its figures."""
    before = set(found.iterdir()) if found.exists() else set()
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        seeds, grown = Path(folder, "seeds"), Path(folder, "grown")
        for each in (seeds, grown):
            each.mkdir()
        for name, data in corpus(target).items():
            if len(data) <= LONGEST:
                (seeds / name).write_bytes(data)
        words = Path(folder, "words")
        words.write_text("".join(f'"{_quoted(word)}"\n' for word in WORDS), encoding="ascii")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "bench.fuzz", "--inside", target, "--"),
                *(f"-max_total_time={seconds}", f"-max_len={LONGEST}", f"-dict={words}"),
                *("-print_final_stats=1", "-timeout=20", "-rss_limit_mb=2048"),
                *(f"-artifact_prefix={found}/{target}-", str(grown), str(seeds)),
            ],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=seconds + 120,
        )
        kept = len(list(grown.iterdir()))
    new = sorted(str(path) for path in set(found.iterdir()) - before)
    if done.returncode and not new:
        raise RuntimeError(f"the fuzzer itself failed:\n{done.stdout}{done.stderr}")
    if new:
        print(done.stdout[-4000:] + done.stderr[-2000:], file=sys.stderr)
    inputs = int((re.findall(r"number_of_executed_units: *(\d+)", done.stderr) or ["0"])[-1])
    return {
        "inputs": inputs,
        "per_second": round(inputs / max(seconds, 1)),
        "reached": int((re.findall(r"cov: (\d+)", done.stderr) or ["0"])[-1]),
        "kept": kept,
        "found": ", ".join(new),
    }


def _quoted(word: str) -> str:
    return "".join(
        c if c.isalnum() or c in " :.?=_-" else "".join(f"\\x{b:02x}" for b in c.encode())
        for c in word
    )


def _fuzz(target: str, options: list[str]) -> None:
    """Feed the target until the time is over or a promise is broken; ends the process."""
    import atheris  # noqa: PLC0415 - not everywhere

    with atheris.instrument_imports(include=["tracker"]):  # so it is imported here and not before
        from tests.hostile.targets import opened  # noqa: PLC0415
        from tracker.operations.telemetry import configure_logs  # noqa: PLC0415
    with open(os.devnull, "w", encoding="ascii") as nowhere, opened(target) as check:
        configure_logs(level="error", stream=nowhere)
        atheris.Setup([sys.argv[0], *options], check)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
