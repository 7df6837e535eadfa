"""Open every page of the book in Chromium, from the file system and without a network.

`python tests/browser/check_book.py [--shots FOLDER] [WORD]` after `make book`. Needs playwright and
a Chromium: playwright's own, or the one that CHROMIUM names. Ends with 1 and a list if anything is
wrong: a console error, a failed request, a page that scrolls sideways, a picture without words, a
serious finding of axe about accessibility, a menu or a film that does nothing, a link to a file or
an anchor that is not there.
"""

import argparse
import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

BOOK = Path(__file__).parents[2] / "build/book"
WIDTHS = (1280, 390)
WIDE = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
NO_WORDS = "() => [...document.images].filter(i => !i.alt).map(i => i.src)"


def pages() -> list[Path]:
    """Return the book's pages, without the listings of source code and the theme's own files."""
    pages = [page for page in BOOK.rglob("*.html") if not {"_modules", "_static"} & {*page.parts}]
    if not pages:
        raise SystemExit(f"There is no book in {BOOK}: run `make book`.")
    return sorted(pages)


def check(page: Page, path: Path, shots: Path | None) -> list[str]:
    """Return what is wrong with one page."""
    found, name = [], str(path.relative_to(BOOK))
    page.on("console", lambda m: m.type == "error" and found.append(f"{name}: {m.text}"))
    page.on("pageerror", lambda error: found.append(f"{name}: {error}"))
    page.on("requestfailed", lambda r: found.append(f"{name}: request failed: {r.url}"))
    page.on("request", lambda r: r.url.startswith("http") and found.append(f"{name}: {r.url}"))
    page.goto(path.as_uri(), wait_until="load")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        if (over := page.evaluate(WIDE)) > 0:
            found.append(f"{name}: scrolls sideways by {over} px at {width} px")
        if shots:
            page.screenshot(path=shots / f"{name.replace('/', '-')}-{width}.png")
    for violation in Axe().run(page, options={"preload": False}).response["violations"]:
        if violation["impact"] in ("serious", "critical"):
            nodes = violation["nodes"]
            found.append(f"{name}: {violation['id']}, {len(nodes)} times: {nodes[0]['html'][:120]}")
    return found + [f"{name}: no words for {source}" for source in page.evaluate(NO_WORDS)]


def search(page: Page, words: str, expected: str) -> list[str]:
    """Return a complaint unless the search for ``words`` finds the page ``expected``."""
    page.goto(f"{(BOOK / 'search.html').as_uri()}?q={words.replace(' ', '+')}")
    page.wait_for_selector("#search-results li a")
    page.wait_for_timeout(1000)
    links = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
    return (
        [] if any(expected in link for link in links) else [f"{words!r} does not find {expected}"]
    )


def unmoved(page: Page) -> list[str]:
    """Return a complaint for each explorer whose menu changes nothing, and for a film at rest."""
    found = []
    for path in sorted(BOOK.glob("docs/see-*.html")):
        page.goto(path.as_uri())
        page.wait_for_timeout(1000)
        for box in page.query_selector_all(".explorer"):
            for label in box.query_selector_all("label"):
                menu, before = label.query_selector("select"), box.inner_html()
                chosen = menu.input_value()
                for other in menu.query_selector_all("option:not(:checked):not(:disabled)")[:1]:
                    menu.select_option(other.inner_text())
                    page.wait_for_timeout(1000)
                    if box.inner_html() == before:
                        name = label.inner_text().split("\n")[0]
                        found.append(f"{path.name}: {name!r} changes nothing")
                    menu.select_option(chosen)
            if strip := box.query_selector(".frames"):
                box.query_selector(".plot").scroll_into_view_if_needed()
                box.query_selector(".plot .nsewdrag").hover()
                page.wait_for_timeout(500)
                if not strip.query_selector(".from"):
                    found.append(f"{path.name}: a weight under the mouse marks no frame")
        if film := page.query_selector(".films img"):
            film.click()
            page.wait_for_function("film => film.src.endsWith('webp') && film.complete", arg=film)
            pictures = {film.screenshot() for _ in range(5) if not page.wait_for_timeout(400)}
            if len(pictures) < 2:
                found.append(f"{path.name}: a film does not play")
    return found


def dead_links() -> list[str]:
    """Return a complaint for each link inside the book whose file or anchor is absent."""
    texts = {
        page: page.read_text(encoding="utf-8")
        for page in BOOK.rglob("*.html")
        if "_static" not in page.parts
    }
    anchors = {page: {*re.findall(r'\bid="([^"]+)"', text)} for page, text in texts.items()}
    found = []
    for page, text in texts.items():
        links = re.findall(
            r'\b(?:href|src)="(?!https?:|mailto:|data:)([^"?#]*)[^"#]*#?([^"]*)"', text
        )
        for path, anchor in {*links}:
            target = (page.parent / unquote(path)).resolve() if path else page
            known = anchors.get(target, {anchor})
            if not target.exists() or (anchor and unquote(anchor) not in known):
                found.append(f"{page.relative_to(BOOK)}: {path}#{anchor} leads nowhere")
    return found


def main() -> None:
    """Check the pages whose names hold WORD, then the search and the controls."""
    parser = argparse.ArgumentParser(description="Check the book in Chromium.")
    parser.add_argument("word", nargs="?", default="", metavar="WORD")
    parser.add_argument("--shots", type=Path, help="folder for pictures of the pages")
    given = parser.parse_args()
    if given.shots:
        given.shots.mkdir(parents=True, exist_ok=True)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    chosen, wrong = [page for page in pages() if given.word in str(page.relative_to(BOOK))], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(offline=True)
        context.set_default_timeout(120_000)  # a busy machine
        for path in chosen:
            page = context.new_page()
            wrong += check(page, path, given.shots)
            page.close()
            print(f"{path.relative_to(BOOK)} ({len(wrong)} wrong so far)", flush=True)
        wrong += unmoved(context.new_page())
        wrong += search(context.new_page(), "attention distance", "07_attention_distance")
        browser.close()
    wrong += dead_links()
    print("\n".join(wrong) or f"{len(chosen)} pages, the search, the controls and the links work.")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
