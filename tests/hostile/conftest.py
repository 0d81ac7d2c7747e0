"""Fixtures: the served application, as the tests of the web have it."""

from tests.web.conftest import is_mounted, serve, site, small_site

__all__ = ["is_mounted", "serve", "site", "small_site"]
