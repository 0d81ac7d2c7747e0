"""The store: schema, engines, the writer of runs, queries and leases."""
