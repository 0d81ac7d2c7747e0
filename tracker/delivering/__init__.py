"""Outputs of runs as files: fetched without a key, from public addresses, whole or not at all.

downloads.py   which runs, and one file for each of their outputs
fetch.py       one link becomes one file
addresses.py   where a link may lead
files.py       private files, partial files, the download directory and its manifest
"""
