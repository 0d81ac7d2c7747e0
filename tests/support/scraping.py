"""Reading what Prometheus would read."""

from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families


class Scrape(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """The samples of one scrape: `scrape.value("tracker_callbacks_total", outcome="applied")`."""

    def value(self, name: str, /, **labels: Any) -> float | None:
        """The sum of all samples with these labels, whatever else they have; `None` without any."""
        wanted = {(key, str(value)) for key, value in labels.items()}
        found = [amount for (of, has), amount in self.items() if of == name and wanted <= has]
        return sum(found) if found else None

    def of(self, *prefixes: str) -> "Scrape":
        """The samples whose names begin so."""
        return Scrape({key: value for key, value in self.items() if key[0].startswith(prefixes)})

    @property
    def names(self) -> set[str]:
        """The names of all samples."""
        return {name for name, _ in self}


def read_scrape(text: str) -> Scrape:
    """The samples in a text in Prometheus's format."""
    return Scrape(
        {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    )


async def scrape(client: httpx.AsyncClient) -> Scrape:
    """What `/metrics` says now."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200, answer.text
    return read_scrape(answer.text)
