"""Input made to hurt: fuzzed, forged, smuggled, and other people's text wherever it is shown."""
