"""What tests share: a PostgreSQL server, databases, waiting, and the network guard."""
