"""Take the picture of docs/explorer.md: `python scripts/explorer/picture.py`, with playwright and a chromium."""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1280, "height": 1090})
    page.goto((ROOT / "gradlab" / "study" / "explorer.html").as_uri() + "#raises")
    page.screenshot(path=ROOT / "docs" / "explorer.png")
    browser.close()
