"""Files behind links."""
