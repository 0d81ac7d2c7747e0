"""The use cases that the worker runs, against the simulator over real HTTP and on both
databases."""
