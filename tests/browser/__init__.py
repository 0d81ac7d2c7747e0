"""The dashboard in Chromium, as a person uses it."""
