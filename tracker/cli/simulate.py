"""`tracker simulate` and `tracker demo`: a local FLORA that needs no key."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tracker.cli.output import JsonFlag, print_json
from tracker.cli.setup import checked
from tracker.core.errors import TrackerError

if TYPE_CHECKING:
    from tracker.simulator import Simulator


def _parse_share(text: str | float) -> float:
    from tracker.simulator import parse_rate

    return checked(parse_rate, str(text))


def _share(help: str) -> Any:
    return typer.Option(metavar="SHARE", parser=_parse_share, help=help)


def simulate(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=0, max=65535)] = 8090,
    seed: Annotated[int, typer.Option(help="The same seed repeats the same runs.")] = 0,
    speed: Annotated[float, typer.Option(help="Factor by which time passes faster.")] = 1.0,
    run_seconds: Annotated[float, typer.Option(help="Typical duration of a run.")] = 20.0,
    failures: Annotated[float, _share("Runs that fail.")] = 0.15,
    drop: Annotated[float, _share("Callbacks that are lost.")] = 0.0,
    duplicate: Annotated[float, _share("Callbacks that are sent twice.")] = 0.0,
    early: Annotated[float, _share("Callbacks sent before the answer to the start.")] = 0.0,
    late: Annotated[float, _share("Callbacks sent long after the end.")] = 0.0,
    reorder: Annotated[float, _share("Callbacks sent after later ones.")] = 0.0,
    bad_signature: Annotated[float, _share("Callbacks preceded by a forged one.")] = 0.0,
    rate_limit: Annotated[float, _share("Requests answered 429.")] = 0.0,
    errors: Annotated[float, _share("Requests answered 500 or 503.")] = 0.0,
    cut: Annotated[float, _share("Requests whose connection is cut.")] = 0.0,
    no_history_outputs: Annotated[
        bool, typer.Option("--no-history-outputs", help="Omit outputs and cost from lists.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other fault or setting. Repeatable."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--at", metavar="SECONDS:NAME=VALUE", help="As --set, after some time."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Serve a local FLORA that needs no key and costs nothing.

    A SHARE is 0.4 or 40%. docs/cli.md lists the names for --set and --at.
    """
    from tracker.simulator import Options, serve

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
            later=tuple(map(_timed, changes or ())),
        ).with_changes(dict(map(_assignment, settings or ())))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

    def print_environment(simulator: "Simulator") -> None:
        if as_json:
            shown = {"url": simulator.root, "environment": simulator.environment}
            print_json(shown, indent=None)  # for `readline`: the command goes on
            return
        typer.echo(f"A local FLORA is at {simulator.root}. To use it:\n")
        for name, value in simulator.environment.items():
            typer.echo(f"export {name}={value}")

    try:
        serve(options, port=port, on_ready=print_environment)
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


def demo(as_json: JsonFlag = False) -> int:
    """Show the tracker at work with a local FLORA.

    It uses a temporary SQLite file.
    """
    from tracker.demo import run

    return run(as_json=as_json)
