"""A run's story in sentences: words.py is the vocabulary, happened.py the past, standing.py the
present."""
