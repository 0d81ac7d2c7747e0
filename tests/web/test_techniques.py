"""`/api/techniques`: the catalogue, searched and shown."""

from tests.support.waiting import free_port, send_once
from tests.web.conftest import Serve, Site
from tests.web.flora import with_flora
from tracker.store.queries import techniques
from tracker.store.queries.techniques import TechniqueRow


async def test_techniques_are_listed_page_by_page(serve: Serve, database_url: str) -> None:
    """Each once, by name, and the last page has no cursor."""
    async with with_flora(serve, database_url) as (site, _):
        await site.services.catalogue_sync.sync()
        names: list[str] = []
        query = "?limit=20"
        for _ in range(2):
            answer = (await site.client.get(f"/api/techniques{query}")).json()
            names += [one["name"] for one in answer["techniques"]]
            query = f"?limit=20&cursor={answer['meta']['next_cursor']}"
        assert answer["meta"] == {"next_cursor": None}
        assert len(names) == len(set(names)) == 38
        assert (names[0], names[-1]) == ("Art Director's Critique", "Wonder(fy)")


async def test_techniques_are_searched(serve: Serve, database_url: str) -> None:
    """By words of the id, the name and the description; what has gone only where asked for."""
    async with with_flora(serve, database_url) as (site, _):
        await site.services.catalogue_sync.sync()
        now = site.services.clock()
        await techniques.add_listed(
            site.services.database, [TechniqueRow(technique_id="tech_x", name="Tarot Old")], now
        )
        await techniques.mark_gone(site.services.database, since=now.replace(year=3000), at=now)
        await site.services.catalogue_sync.sync()
        for query, found in (
            ("?query=tarot", ["Tarot Pull"]),
            ("?query=TAROT%20pull", ["Tarot Pull"]),
            ("?query=tarot&gone=true", ["Tarot Old", "Tarot Pull"]),
            ("?query=nothing-like-it", []),
            ("?query=%25", []),
        ):
            answer = (await site.client.get(f"/api/techniques{query}")).json()
            assert [one["name"] for one in answer["techniques"]] == found, query


async def test_a_technique_is_shown_by_id_and_by_slug(serve: Serve, database_url: str) -> None:
    """With FLORA's own inputs and outputs; FLORA is asked once."""
    async with with_flora(serve, database_url) as (site, flora):
        await site.services.catalogue_sync.sync()
        shown = [
            (await site.client.get(f"/api/techniques/{name}")).json()
            for name in ("product-motion", "tech_product-motion")
        ]
        assert shown[0] == shown[1]
        technique = shown[0]
        assert (technique["technique_id"], technique["slug"], technique["run_cost"]) == (
            "tech_product-motion",
            "product-motion",
            0.9,
        )
        assert [port["id"] for port in technique["inputs"]] == ["product", "soundtrack"]
        assert technique["outputs"][0]["specified_duration"] == 6
        assert (technique["obstacle"], technique["gone_at"]) == (None, None)
        assert flora.world.counts["techniques.get", 200] == 1
        builder = (await site.client.get("/api/techniques/video-scene-builder")).json()
        assert "narration (audioUrl)" in builder["obstacle"]


async def test_an_unknown_technique_is_not_found(serve: Serve, sqlite_url: str) -> None:
    """Whatever stands in its place in the path."""
    async with with_flora(serve, sqlite_url) as (site, _):
        for name in ("nonesuch", "tech_nonesuch", "a%2Fb", "a%00", "%ff", "t" * 300, ".."):
            answer = await site.client.get(f"/api/techniques/{name}")
            assert answer.status_code == 404, name
            assert answer.json()["error"]["code"] == "not_found"


WRONG_QUERIES = [
    ("?limit=0", "limit"),
    ("?limit=101", "limit"),
    ("?gone=perhaps", "gone"),
    ("?cursor=of-another-service", "cursor"),
    ("?query=%00", "query"),
    (f"?query={'q' * 256}", "query"),
    ("?limit=1&limit=2", "limit"),
]


async def test_a_wrong_query_is_refused_by_field(small_site: Site) -> None:
    """400 that names what is wrong."""
    for query, field in WRONG_QUERIES:
        answer = await small_site.client.get(f"/api/techniques{query}")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "input_validation_error"), query
        assert [fault["field"] for fault in error["fields"]] == [field], query


async def test_what_is_known_is_shown_without_flora(serve: Serve, sqlite_url: str) -> None:
    """A FLORA that cannot be reached is a 502 only for what is not known here."""
    nobody = f"http://127.0.0.1:{free_port()}/api/v1"
    async with serve(sqlite_url, flora_base_url=nobody, flora_api_key="sk_test_1") as site:
        send_once(site.services)
        row = TechniqueRow(technique_id="tech_a", name="A", slug="a")
        await techniques.define(site.services.database, row, site.services.clock())
        for name in ("tech_a", "a"):
            assert (await site.client.get(f"/api/techniques/{name}")).json()["name"] == "A"
        answer = await site.client.get("/api/techniques/nonesuch")
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "flora_unreachable")
