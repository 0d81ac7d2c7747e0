"""Webhooks: callbacks from FLORA, and messages to endpoints."""
