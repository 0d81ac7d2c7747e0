#!/bin/sh
# Runs once, when the database is created: creates the read-only role of docs/views.md for Grafana. It
# can also read tables and views that migrations create later.
set -eu
psql --set ON_ERROR_STOP=1 --set password="$(cat /run/secrets/dashboards_password)" \
    --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
CREATE ROLE dashboards LOGIN PASSWORD :'password';
ALTER ROLE dashboards CONNECTION LIMIT 10;
ALTER ROLE dashboards SET default_transaction_read_only = on;
ALTER ROLE dashboards SET statement_timeout = '15s';
GRANT USAGE ON SCHEMA public TO dashboards;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO dashboards;
SQL
