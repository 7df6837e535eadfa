"""Run every notebook in JupyterLab in headless Chromium, at smoke size, and move its controls.

`make test-browser`, or `python tests/browser/run_notebooks.py [--shots FOLDER] [NUMBER ...]`. Needs
jupyterlab, playwright and a Chromium: playwright's own, or the one that CHROMIUM names. Ends with 1
and a list if anything is wrong: a cell with an error, an error in the console, a page that scrolls
sideways, or a control that does not change its picture. Notebook 10 shows the results that are
committed, because it computes none.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from playwright.sync_api import Locator, Page, sync_playwright

from dtlib import batch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build/browser"
MINUTES = 5  # for one notebook; with nothing trained yet each takes 20 to 90 seconds
SHORTEST = 0.5  # seconds between two looks
STDERR = '[data-mime-type="application/vnd.jupyter.stderr"]'  # of errors, too
PROMPTS = """() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')]
    .map(p => p.innerText)"""
WIDE = """() => [...document.querySelectorAll('.jp-OutputArea-output')]
    .filter(o => o.scrollWidth > o.clientWidth + 1 && !o.querySelector('table'))
    .map(o => o.innerText.slice(0, 60))"""


def prepare(wanted: list[str]) -> list[Path]:
    """Copy the notebooks with smoke's parameters to FOLDER, inside the repository."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    copies = []
    for job in batch.plan(ROOT / "notebooks", "smoke", wanted or None, {}):
        notebook = nbformat.read(job.path, as_version=4)
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", []) and not job.path.name.startswith("10"):
                lines = [f"{name} = {value!r}" for name, value in job.values.items()]
                cell.source = "\n".join(lines)
            if cell.cell_type == "markdown":  # its pictures lie where they did
                cell.source = batch.with_links(cell.source, job.path.parent, FOLDER)
        copies.append(FOLDER / job.path.name)
        nbformat.write(notebook, copies[-1])
    settings = FOLDER / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"windowingMode": "none"}))  # all cells are in the page
    return copies


def start_lab() -> tuple[subprocess.Popen, str]:
    """Start JupyterLab without a browser; return the process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"{sys.executable} -m jupyterlab --no-browser --port={port} --ip=127.0.0.1"
    command += f" --IdentityProvider.token= --ServerApp.root_dir={ROOT} --allow-root"
    env = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(FOLDER / "settings")}
    env["OMP_NUM_THREADS"] = "1"  # as in `make lab`; two threads wait for each other on a busy core
    lab = subprocess.Popen(command.split(), env=env, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/api/status", timeout=5)
            return lab, address
        except OSError:
            time.sleep(SHORTEST)
    lab.terminate()
    raise SystemExit("JupyterLab did not start within two minutes.")


def wait_until(condition, seconds: float) -> bool:
    """Return whether ``condition()`` came true within that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(SHORTEST)
    return False


def moves(box: Locator) -> bool:
    """Move one control of an explore cell; return whether its picture changes."""
    before, handle = pictures_of(box), box.locator(".noUi-handle").first
    if handle.count():
        handle.press("ArrowRight")
        if wait_until(lambda: pictures_of(box) != before, 15):
            return True
        handle.press("ArrowLeft")  # it stood at its right end
    else:
        for choice in box.locator("select").all():
            if (number := choice.locator("option").count()) > 1:
                chosen = choice.evaluate("choice => choice.selectedIndex")
                choice.select_option(index=(chosen + 1) % number)
                break
    return wait_until(lambda: pictures_of(box) != before, 15)


def pictures_of(box: Locator) -> list[str]:
    """Return the pictures below the controls of an explore cell."""
    return box.locator("img").evaluate_all("all => all.map(i => i.src)")


def ran(page: Page) -> bool:
    """Return whether each cell has the number of its execution."""
    return all(any(c.isdigit() for c in prompt) for prompt in page.evaluate(PROMPTS))


def failed(page: Page) -> bool:
    """Return whether some cells were not executed and none is at work or waits."""
    return not ran(page) and "*" not in "".join(page.evaluate(PROMPTS))


def kernel_waits(address: str, path: Path) -> bool:
    """Return whether the server has an idle kernel for the notebook, and the page listens to it."""
    with urllib.request.urlopen(f"{address}/api/sessions", timeout=30) as answer:
        of_path = [s["kernel"] for s in json.load(answer) if s["path"] == str(path)]
    return any(k["execution_state"] == "idle" and k["connections"] for k in of_path)


def run_all(page: Page) -> bool:
    """Choose *Run All Cells*, again if JupyterLab drops it; return whether cells are at work."""
    for _ in range(5):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        if wait_until(lambda: any(p.strip("[ ]:") for p in page.evaluate(PROMPTS)), 10):
            return True
    return False


def check(page: Page, address: str, path: Path, shots: Path | None) -> list[str]:
    """Return what is wrong with one notebook."""
    name, found, began, answers = path.stem, [], time.monotonic(), [0.0]
    page.on("pageerror", lambda error: found.append(f"{name}: {error}"))
    page.on("console", lambda m: m.type == "error" and found.append(f"{name}: console: {m.text}"))
    place = f"lab/workspaces/{name}/tree/{path.relative_to(ROOT)}"  # pages share no workspace
    page.goto(f"{address}/{place}?reset", wait_until="load")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
    if not wait_until(lambda: kernel_waits(address, path.relative_to(ROOT)), 120):
        found.append(f"{name}: its kernel did not start within two minutes")
    if not run_all(page):
        found.append(f"{name}: *Run All Cells* started no cell")
    elif not wait_until(lambda: ran(page) or failed(page), 60 * MINUTES):
        found.append(f"{name}: not at its end after {MINUTES} minutes: {page.evaluate(PROMPTS)}")
    if failed(page):
        said = page.locator(STDERR).all_inner_texts()
        found.append(f"{name}: a cell failed: {''.join(said)[-300:]}")
    found += [f"{name}: scrolls sideways: {text!r}" for text in page.evaluate(WIDE)]
    if ran(page):
        boxes = page.locator(".widget-interact").all()
        if "figures.explore(" in path.read_text(encoding="utf-8") and not boxes:
            found.append(f"{name}: there are no controls")
        for i, box in enumerate(boxes):
            asked = time.monotonic()
            if not moves(box):
                found.append(f"{name}: control {i} does not change its picture")
            answers.append(time.monotonic() - asked)
    if shots:
        page.locator(".jp-WindowedPanel-outer").first.screenshot(path=shots / f"{name}.png")
    seconds = f"{time.monotonic() - began:.0f} s, the slowest control answers in {max(answers):.1f}"
    print(f"{name}: {seconds}, {len(found)} complaints", flush=True)
    return found


def check_all(address: str, paths: Iterator[Path], shots: Path | None) -> list[str]:
    """Return what is wrong with the notebooks of ``paths``, one after another in one browser."""
    wrong = []
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for path in paths:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            wrong += check(page, address, path, shots)
            page.close()
        browser.close()
    return wrong


def main() -> None:
    """Run the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shots", type=Path, help="folder for a picture of each notebook")
    parser.add_argument("notebooks", nargs="*")
    asked = parser.parse_args()
    if asked.shots:
        asked.shots.mkdir(parents=True, exist_ok=True)
    copies = prepare(asked.notebooks)
    lab, address = start_lab()
    try:
        with ThreadPoolExecutor() as two:  # each takes the next notebook when it is free
            shared = iter(copies)
            halves = [two.submit(check_all, address, shared, asked.shots) for _ in range(2)]
        wrong = [words for half in halves for words in half.result()]
    finally:
        lab.terminate()
    print(
        "\n".join(wrong) or f"{len(copies)} notebooks run to their ends, and their controls work."
    )
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
