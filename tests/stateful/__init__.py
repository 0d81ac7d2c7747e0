"""The whole tracker against a model of FLORA: events, faults, crashes, forgeries in any order."""
