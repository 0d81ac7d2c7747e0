"""The log: one format for everybody, and no secrets in it."""

import io
import json
import logging
import re

import pytest

from tracker.core.log import get_logger, log_context, redact_also
from tracker.operations.telemetry import configure_logs

SECRETS = ["hunter22", 'quo"te\\d ü', "p@ss/word"]


class Terminal(io.StringIO):
    """A stream that a person looks at."""

    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    """The JSON objects that were logged."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_is_one_object_a_line_whoever_logs() -> None:
    """Our own lines and other libraries' have the same shape and go to the same place."""
    stream = io.StringIO()
    configure_logs(stream=stream)
    get_logger("tracker.web").info("serving", port=80)
    logging.getLogger("uvicorn.error").warning("that was %s", "odd")
    ours, theirs = lines(stream)
    assert ours["event"] == "serving"
    assert ours["port"] == 80
    assert (theirs["event"], theirs["level"], theirs["logger"]) == (
        "that was odd",
        "warning",
        "uvicorn.error",
    )
    assert str(ours["timestamp"]).endswith("Z")


def test_what_fails_after_its_caller_was_cancelled_is_no_news() -> None:
    """Python 3.14 logs it, before it was silent; whatever else asyncio reports is logged."""
    stream = io.StringIO()
    configure_logs(stream=stream)
    loops = logging.getLogger("asyncio")
    loops.error("TimeoutError exception in shielded future\nfuture: <Task finished>")
    loops.error("Task exception was never retrieved")
    assert [line["event"] for line in lines(stream)] == ["Task exception was never retrieved"]


def test_the_format_follows_the_stream_unless_it_is_said() -> None:
    """A terminal gets lines for people, a file JSON; the setting decides where it is given."""
    for stream, given, is_json in [
        (Terminal(), None, False),
        (io.StringIO(), None, True),
        (Terminal(), "json", True),
        (io.StringIO(), "console", False),
    ]:
        configure_logs(format=given, stream=stream)  # type: ignore[arg-type]
        get_logger("x").info("hello")
        assert stream.getvalue().startswith("{") is is_json


def test_libraries_are_as_loud_as_they_are_useful() -> None:
    """The level holds for all; httpx is quiet below a warning, whatever the level."""
    stream = io.StringIO()
    configure_logs(level="debug", stream=stream)
    get_logger("x").debug("ours")
    logging.getLogger("httpx").info("HTTP Request: GET")
    logging.getLogger("apscheduler.executors.default").info("Running job")
    logging.getLogger("apscheduler.scheduler").warning("Execution of job skipped")
    assert [line["event"] for line in lines(stream)] == ["ours"]
    configure_logs(level="error", stream=stream)
    logging.getLogger("httpx").warning("odd")
    get_logger("x").warning("ours")
    assert len(lines(stream)) == 1


@pytest.mark.parametrize("format", ["json", "console"])
def test_known_secrets_are_taken_out_of_every_line(format: str) -> None:
    """As a value, deep in a value, in a message, in a traceback, quoted or percent-encoded."""
    stream = io.StringIO()
    configure_logs(format=format, secrets=SECRETS, stream=stream)  # type: ignore[arg-type]
    log = get_logger("x")
    for secret in SECRETS:
        log.info("value", key=secret, deep={"list": [secret]})
        logging.getLogger("other").warning("message %s", secret)
        try:
            raise ValueError(f"{secret} and {secret!r}")
        except ValueError:
            log.exception("broken")
            logging.getLogger("other").exception("broken")
    log.info("url", url="https://x/?t=p%40ss%2Fword")
    shown = stream.getvalue()
    assert shown.count("[redacted]") >= 7 * len(SECRETS)
    for part in ("hunter22", "quo", "ss/word", "ss%2Fword"):
        assert part not in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("key sk_live_abc-123!", "key sk_live_[redacted]!"),
        ("whsec_abc+/=, next", "whsec_[redacted], next"),
        ("postgres://u:pw@h/d", "postgres://u:[redacted]@h/d"),
        ("Authorization: Bearer abcdefgh12", "Authorization: Bearer [redacted]"),
        (f"t=1,v1={'a' * 64}", "t=1,v1=[redacted]"),
        ("http://[::1]:80/ask_live", "http://[::1]:80/ask_live"),
    ],
)
def test_what_looks_like_a_secret_is_taken_out_unknown_as_it_is(text: str, shown: str) -> None:
    """Someone else's key in a message is no less a key."""
    stream = io.StringIO()
    configure_logs(stream=stream)
    get_logger("x").info(text)
    assert lines(stream)[0]["event"] == shown


def test_a_traceback_shows_no_local_variables() -> None:
    """Neither format prints what variables hold: keys are among them."""
    for stream, format in ((Terminal(), "console"), (io.StringIO(), "json")):
        configure_logs(format=format, stream=stream)  # type: ignore[arg-type]
        unknown = "".join(["correct", "-horse"])
        try:
            raise ValueError(len(unknown))
        except ValueError:
            get_logger("x").exception("broken")
        assert "correct-horse" not in stream.getvalue()
        assert "ValueError" in stream.getvalue()


def test_other_peoples_text_begins_no_line_and_moves_no_cursor() -> None:
    """Control characters in values are shown on a terminal, not obeyed."""
    stream = Terminal()
    configure_logs(stream=stream)
    get_logger("x").info("failed", message="a\n2026 [info] forged\x1b[2J")
    assert len(stream.getvalue().splitlines()) == 1
    try:
        raise ValueError("\x1b[2J\x9b2J")
    except ValueError:
        logging.getLogger("x").exception("broken")
    assert "\x1b[2J" not in stream.getvalue()
    assert "\x9b" not in stream.getvalue()
    assert "\\x1b[2J\\x9b2J" in stream.getvalue()


def test_an_application_hears_the_tracker_by_its_own_handlers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Unless a command configures the log: one line with the fields, nothing printed beside it."""
    stream, log = io.StringIO(), get_logger("tracker.x")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(filename)s %(message)s"))
    logging.getLogger().addHandler(handler)
    log.info("unheard")  # the application's level is WARNING
    with log_context(request_id="req-1"):
        log.warning("run.lost", run_id="run_1", reason="not \x1b found", checks=5)
    assert stream.getvalue() == (
        "WARNING tracker.x test_logs.py "
        "run.lost request_id=req-1 run_id=run_1 reason='not \\x1b found' checks=5\n"
    )
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""


def test_secrets_stay_out_of_an_applications_log() -> None:
    """Known ones and what looks like one, in values and in tracebacks."""
    redact_also(["hunter33"])
    stream, log = io.StringIO(), get_logger("tracker.x")
    logging.getLogger().addHandler(logging.StreamHandler(stream))
    try:
        raise ValueError("hunter33 and whsec_abc")
    except ValueError:
        log.exception("broken", key="sk_live_abc", at="postgresql://u:secret@h/d hunter33")
    assert "Traceback" in stream.getvalue()
    assert not re.search("hunter33|u:secret|_abc", stream.getvalue())
