"""The page about tables: its columns are there, with their types."""

import re

from sqlalchemy.dialects import postgresql

from tests.docs.pages import DOCS
from tracker.store.schema import metadata

SHORT = {"timestamp with time zone": "timestamptz"}


def test_the_page_has_columns_that_are_there() -> None:
    """Each with the type that it has on PostgreSQL; the tables that a role may read are among
    them."""
    parts = re.split(r"^## `(\w+)`$", (DOCS / "tables.md").read_text(encoding="utf-8"), flags=re.M)
    page = dict(zip(parts[1::2], parts[2::2], strict=True))
    for table, text in page.items():
        found = metadata.tables[table].c
        rows = re.findall(r"^\| `(\w+)` \| ([a-z ]+) \| .+ \|$", text, re.MULTILINE)
        types = {name: found[name].type.compile(postgresql.dialect()).lower() for name, _ in rows}
        assert dict(rows) == {name: SHORT.get(kind, kind) for name, kind in types.items()}
        assert {one.name for one in metadata.tables[table].primary_key} <= {
            *types,
            "id",
            "workspace_slot",
        }
    views = (DOCS / "views.md").read_text(encoding="utf-8")
    (granted,) = re.findall(r"GRANT SELECT ON (runs, .+) TO", views)
    assert set(granted.split(", ")) <= set(page)
