"""The report in a real browser: it shows something, in both themes, and nothing sticks out at the side.

Needs Chromium or Chrome (Debian: `apt-get install chromium`); without one these tests are skipped, and say so.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lcprune.delivery import report, runs
from lcprune.merging.lineage import MergeHistory
from tests.delivery.run_folders import step, write
from tests.delivery.test_report import full_look

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
DEEP = MergeHistory(
    80,
    tuple(step(at, at + 1, at=4 * at, measured={"val/perplexity": 20.0 + at}) for at in range(10, 40)),
    teacher="somebody/a-model-with-quite-a-long-name-70B-Instruct",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed"),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of a small run, of a deep one, and of both."""
    folder = tmp_path_factory.mktemp("reports")
    small, deep = runs.read(write(folder / "small")), runs.read(write(folder / "deep", DEEP))
    found = {name: folder / f"{name}.html" for name in ("small", "deep", "both")}
    report.write([(small, full_look())], found["small"])
    report.write([(deep, report.Look())], found["deep"])
    report.write([(small, full_look()), (deep, report.Look())], found["both"])
    return found


def browse(profile: Path, *arguments: str) -> str:
    assert BROWSER is not None
    common = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}")
    done = subprocess.run([BROWSER, *common, *arguments], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def screenshot(page: Path, profile: Path, *arguments: str) -> bytes:
    """The gray values of the page's first 1200 x 2000 pixels."""
    from PIL import Image

    png = profile / "page.png"
    browse(profile, "--window-size=1200,2000", f"--screenshot={png}", *arguments, page.as_uri())
    with Image.open(png) as image:
        return image.convert("L").tobytes()


def mean(gray: bytes) -> float:
    return sum(gray) / len(gray)


def test_page_is_not_blank_and_dark_where_the_user_wants_it(pages: dict[str, Path], tmp_path: Path):
    light = screenshot(pages["small"], tmp_path)
    dark = screenshot(pages["small"], tmp_path, "--blink-settings=preferredColorScheme=0")
    assert len(set(light)) > 100
    assert len(set(dark)) > 100
    assert sum(value < 128 for value in light) > 0.01 * len(light)
    assert mean(light) > 200
    assert mean(dark) < 80


@pytest.mark.parametrize("name", ["small", "deep", "both"])
@pytest.mark.parametrize("width", [360, 768, 1200])
def test_nothing_sticks_out_at_the_side(pages: dict[str, Path], name: str, width: int, tmp_path: Path):
    # A window cannot be as narrow as a telephone, a frame can.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="page" src="{pages[name].as_uri()}" style="border: 0; width: {width}px; height: 900px"></iframe>'
        "<script>onload = () => { const it = document.getElementById('page').contentDocument.documentElement; "
        "document.title = `${it.clientWidth} ${it.scrollWidth} ${it.scrollHeight}` }</script>"
    )
    dom = browse(tmp_path, "--allow-file-access-from-files", "--dump-dom", frame.as_uri())
    measured = re.search(r"<title>(\d+) (\d+) (\d+)</title>", dom)
    assert measured is not None
    client, scroll, height = map(int, measured.groups())
    assert client == width
    assert scroll <= client
    assert height > 2000
