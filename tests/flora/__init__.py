"""FLORA's API, signature and field names; the far end is replaced at the transport."""
