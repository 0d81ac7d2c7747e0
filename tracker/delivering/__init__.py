"""Files behind links: fetched without a key, from public addresses, whole or not at all.

Links come from outside. guard.py decides where a request may go, fetch.py reads one file into one
place, endings.py says what a file is called by its content.
"""
