"""An id in a path: it may hold any character, slashes and line ends too.

Starlette's own `path` ends at a line end, so that the page of such an id could not be reached.
"""

from typing import Final

from starlette.convertors import Convertor, register_url_convertor

ANY: Final = "any"
"""The kind of a path's parameter: `{run_id:any}`."""


class _Any(Convertor[str]):
    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor(ANY, _Any())
