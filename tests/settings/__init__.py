"""Settings and the log: what is read from outside, and what never gets out."""
