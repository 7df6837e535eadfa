"""Pages to look at: explorers over the committed tables, and the gallery of films."""

import json
from pathlib import Path

import pandas as pd
from matplotlib.colors import to_hex

from dtlib.compare import read_table
from dtlib.figures import COLOURS

ROOT = Path(__file__).parents[1]
FIGURES, FILMS, WINDOWS = ROOT / "figures", ROOT / "docs/films", ROOT / "docs/windows"
PLACE = "*In the book, it stands here: `make book`.*"
HTML = "\n```{{raw}} html\n{}\n```\n"


def explorer(given: dict | None) -> str:
    """Return the HTML of an explorer, or one sentence if its tables are absent."""
    if given is None:
        return "The tables of this page are absent: run `make figures`."
    data = json.dumps(given, separators=(",", ":")).replace("</", "<\\/")
    script = '<script src="../_static/plotly.min.js"></script>'
    box = f'<div class="explorer"><script type="application/json">{data}</script></div>'
    return HTML.format(script + box)


def read(pattern: str) -> pd.DataFrame:
    """Return all tables figures/PROFILE/``pattern`` below each other, with their profile."""
    tables = []
    for path in sorted(FIGURES.glob(f"*/{pattern}")):
        profile = path.relative_to(FIGURES).parts[0]
        if profile not in ("smoke", "mine") and path.with_name("results.json").exists():
            tables.append(read_table(path).assign(profile=profile))
    found = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    return found.sort_values("profile", ascending=False, kind="stable") if tables else found


def rows(table: pd.DataFrame, names: list[str]) -> list[dict]:
    """Return the columns ``names`` as rows of four digits, with null for what is unknown."""
    chosen = table[names].drop_duplicates()
    numbers = chosen.select_dtypes("float").columns
    short = {name: chosen[name].map(lambda value: float(f"{value:.4g}")) for name in numbers}
    return json.loads(chosen.assign(**short).to_json(orient="records"))


def menus(table: pd.DataFrame, *names: str, all_of: bool = False) -> dict[str, list]:
    """Return the values to choose from, by column; with ``all_of``, "all" comes first."""
    first = ["all"] if all_of else []
    return {name: [*first, *table[name].astype(str).unique()] for name in names}


def lines(table: pd.DataFrame, choice: str, x: str, measures: list[str]) -> dict | None:
    """Return what draws ``measures`` along ``x``, for a choice of setting, ``choice`` and seed."""
    if table.empty:
        return None
    table = table.assign(setting=table.profile + ", " + table.task)
    names = ["setting", choice, "initialisation", "seed", x, *measures]
    chosen = menus(table, "setting", choice) | menus(table, "seed", all_of=True)
    return {"rows": rows(table, names), "menus": chosen, "x": x, "measures": measures}


def curves() -> dict | None:
    """Return the learning curves of notebook 05, which has both K."""
    table = pd.concat([read("05_*/learning_curves*.csv"), read("05_*/controls*.csv")])
    table = table.rename(columns={"arm": "context"})
    return lines(table, "context", "step", ["action_error", "return"])


def changes() -> dict | None:
    """Return how far every tensor moved, from notebook 03."""
    table = read("03_*/every_tensor*.csv")
    return lines(table, "kind", "block", ["relative", "distance", "cosine"])


def attention() -> dict | None:
    """Return the mean attention of every head before and after fine-tuning, from notebook 07."""
    table = read("07_*/maps*.csv")
    if table.empty:
        return None
    # What two profiles share, a run of the same settings, is shown once.
    table = table.drop_duplicates([name for name in table if name != "profile"])
    table["setting"] = table.profile + ", " + table.task
    names = ["setting", "initialisation", "epoch", "block", "head", "query", "key", "weight"]
    given = {"rows": rows(table, names), "first": int(table.epoch.min())}
    given["menus"] = menus(table, "setting", "initialisation", "block", "head")
    return given | {"last": int(table.epoch.max())}


def looks() -> dict | None:
    """Return every weight of every head on three windows, from scripts/make_windows.py."""
    if not (path := WINDOWS / "weights.json").exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def judged() -> dict | None:
    """Return all verdicts, from notebook 10."""
    table = pd.concat([read(f"10_*/{name}*.csv") for name in ("verdicts", "controls", "wikipedia")])
    if table.empty:
        return None
    found = {path.stem[:2]: path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    numbers = table.notebook.astype(int).astype(str).str.zfill(2)
    table["page"] = numbers.map(found)
    names = ["claim", "rule", "measure", "task", "effect", "low", "high", "threshold", "seeds"]
    names += ["verdict", "section", "profile", "page"]
    given = {"rows": rows(table, names), "menus": menus(table, "profile", "task")}
    more = menus(table, "section", "measure", "verdict", all_of=True)
    return given | {"menus": given["menus"] | more}


def gallery() -> str:
    """Return the HTML of the films, each with what it shows in words, and a button for all."""
    if not (FILMS / "films.json").exists():
        return "The films are absent: run `python scripts/make_films.py`."
    cells = []
    for name, film in json.loads((FILMS / "films.json").read_text(encoding="utf-8")).items():
        asked = f", asked for {film['target']:.0f}" if film["target"] else ""
        ends = f"falls at step {film['steps']}" if film["fell"] else "does not fall"
        words = f"{film['who']}{asked}: returns {film['return']:.0f} and {ends}"
        cells.append(
            f'<figure><img tabindex="0" role="button" src="films/{name}.png" alt="{words}" '
            f'data-film="films/{name}"><figcaption>{words}.</figcaption></figure>'
        )
    button = "<button>Play or stop all</button>"
    box = f'<div class="film-gallery">{button}<div class="films">{"".join(cells)}</div></div>'
    return HTML.format(box)


def filled(page: Path, text: str) -> str:
    """Return the text of a page docs/see-*.md with what stands in the places of PLACE."""
    drawn = {"kind": "lines", "colours": {name: to_hex(c) for name, c in COLOURS.items()}}
    kinds = {
        "see-curves": [(curves, drawn)],
        "see-change": [(changes, drawn)],
        "see-attention": [(looks, {"kind": "windows"}), (attention, {"kind": "maps"})],
        "see-verdicts": [(judged, {"kind": "verdicts"})],
    }
    if page.stem == "see-films":
        return text.replace(PLACE, gallery())
    for table, kind in kinds[page.stem]:
        found = table()
        text = text.replace(PLACE, explorer(found and found | kind), 1)
    return text
