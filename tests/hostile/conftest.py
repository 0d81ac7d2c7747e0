"""Fixtures: the served application, as the tests of the web have it."""

from tests.web.conftest import serve, site, small_site

__all__ = ["serve", "site", "small_site"]
