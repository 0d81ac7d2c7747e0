"""The tracker as it is deployed: real processes, really killed."""
