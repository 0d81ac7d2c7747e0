"""What tests share: a PostgreSQL server, databases, waiting, and the wall around them."""
