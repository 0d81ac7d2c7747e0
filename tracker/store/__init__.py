"""The store: the database's tables, the one door that writes runs, the claims, and the readers."""
