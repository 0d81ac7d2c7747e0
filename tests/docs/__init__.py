"""The documentation: its examples are executed, and the site is built."""
