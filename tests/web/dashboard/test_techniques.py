"""The pages of techniques: how to run one for a sheet."""

import shlex

from tests.web.conftest import Site
from tests.web.dashboard.conftest import HTML
from tracker.core.clock import utc_now
from tracker.core.starts import Port
from tracker.starting.plan import read_rows
from tracker.starting.sheet import read_csv
from tracker.store.queries import techniques
from tracker.store.queries.techniques import TechniqueRow


async def _define(site: Site, slug: str, *inputs: dict[str, str]) -> None:
    row = TechniqueRow(technique_id=f"tech_{slug}", slug=slug, name=slug, inputs=inputs)
    await techniques.define(site.services.database, row, utc_now())


async def test_a_technique_offers_a_sheet_and_its_command(small_site: Site) -> None:
    """The sheet has a column for each input, and one more to name the files by; the command takes
    the sheet under the name that the browser saves it under."""
    inputs = ({"id": "prompt", "type": "text"}, {"id": "face", "type": "imageUrl"})
    await _define(small_site, "cctv-cam", *inputs)
    page = (await small_site.client.get("/techniques/cctv-cam", headers=HTML)).text
    answer = await small_site.client.get("/techniques/tech_cctv-cam/sheet.csv")
    assert answer.headers["content-disposition"].endswith("cctv-cam.csv")
    command = "tracker batch cctv-cam cctv-cam.csv --download cctv-cam --name-by SKU"
    assert f"<code>{command}</code>" in page
    sheet = read_csv(answer.content + b"A-1,a street,https://example.com/face.png\n")
    ports = [Port(**one) for one in inputs]
    reading = read_rows(sheet, ports)
    assert (reading.problems, reading.unmapped, len(reading.rows)) == ((), ("SKU",), 1)


async def test_without_known_inputs_there_is_no_sheet(small_site: Site) -> None:
    """No link for an input that no sheet can give; a formula as a name is made harmless."""
    await _define(small_site, "drawing", {"id": "strokes", "type": "vector"})
    page = (await small_site.client.get("/techniques/drawing", headers=HTML)).text
    assert "tracker batch" not in page
    assert (await small_site.client.get("/techniques/drawing/sheet.csv")).status_code == 404
    await _define(small_site, "odd; name", {"id": "=cmd()", "type": "text"})
    page = (await small_site.client.get("/techniques/tech_odd; name", headers=HTML)).text
    command = page.split("tracker batch")[1].split("</code>")[0].replace("&#39;", "'")
    assert shlex.split(command)[:2] == ["odd; name", "odd-name.csv"]
    sheet = (await small_site.client.get("/techniques/tech_odd; name/sheet.csv")).text
    assert sheet == "\ufeffSKU,'=cmd()\n"
