"""What tables and indexes take on disk, in both databases' own words."""

from typing import Final

SIZES: Final = {
    "postgresql": """
        SELECT c.relname AS name, t.relname AS of, pg_relation_size(c.oid) AS size
        FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid
        JOIN pg_class t ON t.oid = coalesce(i.indrelid, c.oid)
        JOIN pg_namespace n ON n.oid = t.relnamespace AND n.nspname = 'public'
        WHERE c.relkind IN ('r', 'i')""",
    "sqlite": """
        SELECT s.name AS name, coalesce(m.tbl_name, s.name) AS of, s.pgsize AS size
        FROM dbstat AS s LEFT JOIN sqlite_schema AS m ON m.name = s.name
        WHERE s.aggregate = TRUE""",
}
"""The name of a table or an index, of which table it is, and its bytes."""
