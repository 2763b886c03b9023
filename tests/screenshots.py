"""Makes the screenshots of docs/serving.md: the playground with the embedded model.

python tests/screenshots.py
"""

import io
import pathlib
import runpy
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import browsing  # noqa: E402
from PIL import Image  # noqa: E402
from serving import Server  # noqa: E402

from collab_jax.serve.__main__ import CONFIG, make_service  # noqa: E402

QUESTION = "25 14 28=50"  # at which the embedded model calls
# name: width and height of the window, colours
SHOTS = {
    "playground-desktop": (1240, 860, "light"),
    "playground-phone": (360, 800, "dark"),
}
PALETTE = 128  # colours of a picture, which makes it small


def shoot(page, path: pathlib.Path) -> None:
    """Writes a picture of the page after a question."""
    page.get_by_label("Question", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    page.locator(".trace").wait_for()
    page.get_by_role("button", name="Send").wait_for()
    page.locator(".verdict").scroll_into_view_if_needed()
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(PALETTE).save(path, optimize=True)


def main() -> None:
    if reason := browsing.missing():
        sys.exit(reason)
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.serve.slots = 4  # fewer programs to compile
    with tempfile.TemporaryDirectory() as folder:
        service = make_service(config, pathlib.Path(folder))
        service.engine.ready.wait()
        with Server(service) as server, browsing.chromium() as browser:
            for name, (width, height, colours) in SHOTS.items():
                path = ROOT / "docs" / f"{name}.png"
                size = {"width": width, "height": height}
                page = browser.new_page(viewport=size, color_scheme=colours)
                page.goto(f"http://127.0.0.1:{server.port}/")
                shoot(page, path)
                print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
