"""`tracker simulate` and `tracker demo`: a local FLORA that needs no key."""

from typing import TYPE_CHECKING, Any

import typer

from tracker.cli.options import AS_JSON, checked, flag, option, repeatable
from tracker.cli.output import print_json
from tracker.core.errors import TrackerError

if TYPE_CHECKING:
    from tracker.simulator import Simulator


def _parse_share(text: str | float) -> float:
    from tracker.simulator import parse_rate

    return checked(parse_rate, str(text))


def _share(help: str, default: float = 0.0) -> Any:
    return option(help, metavar="SHARE", parser=_parse_share, default=default)


def simulate(
    port: int = option("Port on 127.0.0.1.", default=8090, min=0, max=65535),
    seed: int = option("The same seed repeats the same runs.", default=0),
    speed: float = option("Factor by which time passes faster.", default=1.0),
    run_seconds: float = option("Typical duration of a run.", default=20.0),
    failures: float = _share("Runs that fail.", 0.15),
    drop: float = _share("Callbacks that are lost."),
    duplicate: float = _share("Callbacks that are sent twice."),
    early: float = _share("Callbacks sent before the answer to the start."),
    late: float = _share("Callbacks sent long after the end."),
    reorder: float = _share("Callbacks sent after later ones."),
    bad_signature: float = _share("Callbacks preceded by a forged one."),
    rate_limit: float = _share("Requests answered 429."),
    errors: float = _share("Requests answered 500 or 503."),
    cut: float = _share("Requests whose connection is cut."),
    no_history_outputs: bool = flag("--no-history-outputs", "Omit outputs and cost from lists."),
    settings: list[str] = repeatable("--set", "NAME=VALUE", "Any other fault or setting."),
    changes: list[str] = option(
        "As --set, after some time.", "--at", metavar="SECONDS:NAME=VALUE", default=[]
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Serve a local FLORA that needs no key and costs nothing.

    A SHARE is 0.4 or 40%. docs/cli.md lists the names for --set and --at.
    """
    from tracker.simulator import Options, fault_of, serve

    try:
        options = Options(
            seed=seed,
            speed=speed,
            run_seconds=run_seconds,
            failures=failures,
            drop=drop,
            duplicate=duplicate,
            early=early,
            late=late,
            reorder=reorder,
            bad_signature=bad_signature,
            rate_limit=rate_limit,
            errors=errors,
            cut=cut,
            history_outputs=not no_history_outputs,
        ).with_changes(dict(map(_assignment, settings)))
        planned = list(map(_timed, changes))
        for _, change in planned:
            options.with_changes(change)
    except ValueError as error:
        raise typer.BadParameter(fault_of(error)) from error

    def begin(simulator: "Simulator") -> None:
        for after, change in planned:
            simulator.world.change(change, after=after)
        if as_json:
            shown = {"url": simulator.root, "environment": simulator.environment}
            print_json(shown, indent=None)  # for `readline`: the command goes on
            return
        typer.echo(f"A local FLORA is at {simulator.root}. To use it:\n")
        for name, value in simulator.environment.items():
            typer.echo(f"export {name}={value}")

    try:
        serve(options, port=port, on_ready=begin)
    except OSError as error:
        raise TrackerError(
            f"cannot serve on 127.0.0.1 port {port}: {error.strerror}; "
            "choose another one with --port"
        ) from error


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not NAME=VALUE")
    return name.strip().replace("-", "_"), value


def _timed(text: str) -> tuple[float, dict[str, str]]:
    seconds, _, assignment = text.partition(":")
    try:
        after = float(seconds)
    except ValueError:
        raise ValueError(f"{text!r} is not SECONDS:NAME=VALUE") from None
    return after, dict([_assignment(assignment)])


def demo(as_json: bool = AS_JSON) -> int:
    """Show the tracker at work with a local FLORA.

    It uses a temporary SQLite file.
    """
    from tracker.cli.demo import run

    return run(as_json=as_json)
