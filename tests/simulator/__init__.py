"""The local FLORA: what it answers, what it sends, and how it goes wrong when told to."""
