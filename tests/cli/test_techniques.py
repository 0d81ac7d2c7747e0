"""`tracker techniques`: the catalogue, as people and programs read it."""

from contextlib import ExitStack

from tests.cli.conftest import Commands, simulate


def test_the_catalogue_is_read_searched_and_shown(tracker: Commands, stack: ExitStack) -> None:
    """From nothing known to a technique's inputs, and the command that starts it."""
    simulate(tracker, stack)
    tracker.environ["FLORA_WORKSPACE_ID"] = ""  # it is learnt
    empty = tracker("techniques", "list")
    assert empty.returncode == 0
    assert "tracker techniques sync" in empty.stderr

    report = tracker.json("techniques", "sync")
    assert (report["new"], report["gone"], report["complete"]) == (38, 0, True)
    assert [one["workspace_id"] for one in report["lists"]] == ["ws_simulator"]
    again = tracker("techniques", "sync")
    assert "0 new, 0 retired, 0 restored" in again.stdout

    found = tracker.json("techniques", "list", "SHOT", "phone")
    assert [one["technique_id"] for one in found["techniques"]] == ["tech_ugc-creation"]
    page = tracker("techniques", "list", "--limit", "2")
    assert "Art Director's Critique" in page.stdout
    assert "0.35" in page.stdout
    cursor = page.stderr.split("--cursor ")[1].strip()
    rest = tracker.json("techniques", "list", "--cursor", cursor)["techniques"]
    assert (len(rest), rest[0]["name"]) == (36, "Book Drop")

    shown = tracker("techniques", "show", "product-animator").stdout
    assert "$0.80 for each run" in shown
    assert "5 s" in shown
    assert shown.splitlines()[-1] == 'tracker runs start product-animator --input "product=…"'
    by_id = tracker.json("techniques", "show", "tech_product-animator")
    assert [one["id"] for one in by_id["inputs"]] == ["product", "motion"]
    assert by_id["slug"] == "product-animator"

    needs_sound = tracker("techniques", "show", "video-scene-builder").stdout
    assert "it needs narration (audioUrl)" in needs_sound
    assert "runs start" not in needs_sound
    unknown = tracker("techniques", "show", "nonesuch")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "there is no technique nonesuch" in unknown.stderr


def test_the_catalogue_is_shown_without_a_key(tracker: Commands) -> None:
    """What is known is shown; that FLORA was not asked is said."""
    assert tracker.json("techniques", "list") == {"techniques": [], "meta": {"next_cursor": None}}
    done = tracker("techniques", "show", "cctv-cam")
    assert done.returncode == 1
    assert "FLORA_API_KEY is not set" in done.stderr


def test_a_list_that_is_not_read_whole_is_status_1(tracker: Commands, stack: ExitStack) -> None:
    """The workspace and the reason are told."""
    simulate(tracker, stack)
    done = tracker("techniques", "sync", FLORA_API_KEY="sk_test_wrong")
    assert done.returncode == 1
    assert "could not be read: FLORA answered 401" in done.stderr
