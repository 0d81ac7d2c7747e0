"""The Python interface: `Tracker` and the values that it returns."""
