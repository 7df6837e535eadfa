"""Build the book: gather pages and executed notebooks in build/pages, turn them into build/book.

Nothing is executed. Notebooks get the outputs that the batch kept in figures/PROFILE/NAME.
"""

import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mathjax
import nbformat
import see
from PIL import Image, ImageDraw
from plotly.offline import get_plotlyjs

from dtlib import profiles
from dtlib.compare import other_settings, read_results

ROOT = Path(__file__).parents[1]
DOCS, PAGES, BOOK = ROOT / "docs", ROOT / "build/pages", ROOT / "build/book"
PROFILE = (sys.argv[1:] or ["laptop"])[0]
ADDRESS = os.environ.get("BOOK_REPOSITORY", "")  # https://github.com/owner/name, if it is known
# A link or a picture: [text](target), ![text](target).
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def notebooks() -> list[Path]:
    """Return the notebooks in the order of the guide, then those that it does not name.

    After a notebook follow the names NAME--PROFILE.ipynb for its results at other profiles.
    """
    folder = ROOT / "notebooks"
    guide = (folder / "README.md").read_text(encoding="utf-8")
    order = re.findall(r"\]\((\w+)\.ipynb\)", guide)
    found, known = [], sorted(path.stem for path in folder.glob("*.ipynb"))
    for name in dict.fromkeys([*order, *known]):
        sets = sorted((ROOT / "figures").glob(f"*/{name}/executed.ipynb"))
        profiles = [path.parts[-3] for path in sets]
        others = [profile for profile in profiles if profile not in (PROFILE, "smoke", "mine")]
        found += [name, *(f"{name}--{profile}" for profile in others)]
    return [folder / f"{name}.ipynb" for name in found]


def pages() -> dict[str, list[Path]]:
    """Return the pages of the book, part by part, in the order of reading."""
    return {
        "The questions": [ROOT / "notebooks/README.md", *notebooks()],
        "The answers": [ROOT / "figures/README.md", *sorted(DOCS.glob("see-*.md"))],
        "Use it": [
            *sorted(DOCS.glob("how-*.md")),
            DOCS / "many-machines.md",
            ROOT / "benchmarks/README.md",
        ],
        "The code": [DOCS / "core.md"],
    }


def place(source: Path) -> Path:
    """Return where a file of the repository stands among the pages."""
    return PAGES / ("index.md" if source == ROOT / "README.md" else source.relative_to(ROOT))


def copy(target: Path, landing: Path) -> None:
    """Copy a linked file, a picture with 256 colours, a third of the bytes.

    In the place of a figure that is not drawn yet, write a picture that says so.
    """
    landing.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        name = target.relative_to(ROOT)
        print(f"{name} is linked and absent: run `make figures`.", file=sys.stderr)
        picture = Image.new("RGB", (600, 60), "white")
        ImageDraw.Draw(picture).text((10, 20), f"{name} is not drawn yet", fill="black")
        picture.save(landing, "png")
    elif target.suffix == ".png":
        Image.open(target).convert("RGB").quantize(256).save(landing)
    else:
        shutil.copyfile(target, landing)


def with_links(text: str, source: Path, known: set[Path]) -> str:
    """Return Markdown of ``source`` whose links lead to pages, lists of figures, or copied files.

    A link to anything else of the repository becomes its text. Raises SystemExit for a dead link.
    """

    def replace(found: re.Match) -> str:
        target = (source.parent / found[1]).resolve()
        drawn = ROOT / "figures" in target.parents and target.suffix
        if not target.exists() and not drawn:
            raise SystemExit(f"{source.relative_to(ROOT)} links to {found[1]}, which is absent.")
        anchor = found[2] or ""
        if target.is_dir() and ROOT / "figures" in target.parents:
            profile, *_ = target.relative_to(ROOT / "figures").parts
            one = any(target.glob("*.png"))
            anchor = f"#{target.name.replace('_', '-')}" if one else ""
            landing = PAGES / f"figures/{profile}.md"
        elif target.is_dir() or target.suffix == ".py":
            return "]{.file}"
        else:
            landing = place(target)
            if target not in known:
                copy(target, landing)
        return f"]({os.path.relpath(landing, place(source).parent)}{anchor})"

    return LINK.sub(replace, text)


def with_results(page: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs kept for it, code folded except the measures.

    A caption below each figure links its numbers. Says in a note what is missing or stale.
    """
    name, _, other = page.stem.partition("--")
    today, profile = nbformat.read(page.with_stem(name), as_version=4), other or PROFILE
    kept, outputs = ROOT / "figures" / profile / name / "executed.ipynb", {}
    if kept.exists():
        executed = nbformat.read(kept, as_version=4).cells
        outputs = {(c.id, c.source): c.outputs for c in executed if c.cell_type == "code"}
    title, newline, rest = today.cells[0].source.partition("\n")
    if other:
        title += f" (profile {other})"
    elif ADDRESS:
        title += f"\n\n{ways_in(name, ADDRESS)}"
    today.cells[0].source = title + newline + rest
    results = kept.with_name("results.json")
    found = read_results(results) if results.exists() else {}
    code = [cell for cell in today.cells if cell.cell_type == "code"]
    stale = [cell for cell in code if (cell.id, cell.source) not in outputs]
    cells = []
    for cell in today.cells:
        cells.append(cell)
        if cell.cell_type == "code":
            cell.outputs = outputs.get((cell.id, cell.source), [])
            cells += finish(cell, kept.parent, found.get("verdicts", []))
    if found and (other := other_settings(results)):
        text = f"These results were made with other settings than those of `{profile}`: {other}."
        cells.insert(1, nbformat.v4.new_markdown_cell(f":::{{warning}}\n{text}\n:::"))
    if kept.exists() and not results.exists():
        text = "A run was interrupted here: some figures may be newer than the outputs below."
        cells.insert(1, nbformat.v4.new_markdown_cell(f":::{{warning}}\n{text}\n:::"))
    if stale:
        missing = "No results of this notebook are kept for"
        if len(stale) < len(code):
            missing = "Some results are absent, as the notebook changed after it was run at"
        command = f"make figures PROFILE={profile} NOTEBOOKS={name}"
        text = f"{missing} the profile `{profile}`. They are made by `{command}`."
        cells.insert(1, nbformat.v4.new_markdown_cell(f":::{{note}}\n{text}\n:::"))
    today.cells = cells
    return today


def ways_in(name: str, address: str) -> str:
    """Return words that open a notebook of the published repository on Binder or in Colab."""
    repository = address.removeprefix("https://github.com/")
    binder = f"https://mybinder.org/v2/gh/{repository}/main?urlpath=lab/tree/notebooks/{name}.ipynb"
    where = "https://colab.research.google.com/github"
    colab = f"{where}/{repository}/blob/main/notebooks/{name}.ipynb"
    first = f"!git clone -q {address} dtlib && pip install -q ./dtlib\n%cd dtlib/notebooks"
    return (
        f"Run it [on Binder]({binder}), where the first visitor waits for minutes, or "
        f"[in Colab]({colab}). Both are untested. In Colab run this first, in a new cell:\n\n"
        f"```text\n{first}\n```\n"
    )


def uncut(table: str, rows: list[dict]) -> str:
    """Return the HTML of a table of verdicts with the claims and rules that pandas cut off.

    ``rows`` are the verdicts of the same notebook, in the same order.
    """

    def replace(line: re.Match) -> str:
        row = rows[int(line[1])] if int(line[1]) < len(rows) else {}
        return re.sub(r"<td>([^<]{30,})</td>", lambda cell: whole(cell[1], row), line[0])

    def whole(text: str, row: dict) -> str:
        start = html.unescape(text.removesuffix("..."))
        if text.endswith("..."):
            known = [value for value in row.values() if str(value).startswith(start)]
            text = html.escape(known[0]) if known else text
        return f'<td class="long">{text}</td>'

    return re.sub(r"<tr>\s*<th>(\d+)</th>.*?</tr>", replace, table, flags=re.DOTALL)


def finish(
    cell: nbformat.NotebookNode, folder: Path, verdicts: list[dict]
) -> list[nbformat.NotebookNode]:
    """Fold a cell, describe its pictures, mend its tables; return captions of its figures."""
    for output in cell.outputs:
        if "text/html" in output.get("data", {}):
            output.data["text/html"] = uncut(output.data["text/html"], verdicts)
    tags = cell.metadata.get("tags", [])
    if "measure" not in tags:
        cell.metadata["tags"] = [*tags, "hide-input"]
    if drawn := [
        o.metadata.get("image/png", {}) for o in cell.outputs if "image/png" in o.get("data", {})
    ]:
        words = " ".join(about["alt"] for about in drawn if "alt" in about)
        image = {"alt": words or "A picture drawn by the code above"}
        image["width"] = f"{drawn[0].get('width', 480)}px"
        cell.metadata["mystnb"] = {"image": image}
    captions = []
    for name in [tag.removeprefix("figure-") for tag in tags if tag.startswith("figure-")]:
        links = [
            f"[{what}](../{(folder / f'{name}.{end}').relative_to(ROOT)})"
            for what, end in (("numbers", "csv"), ("pdf", "pdf"))
            if (folder / f"{name}.{end}").exists()
        ]
        if links:
            label = f"(figure-{folder.parent.name}-{folder.name}-{name})=\n"
            text = f"{label}*{name}*: {', '.join(links)}. The code is folded above."
            captions.append(nbformat.v4.new_markdown_cell(text))
    return captions


def list_figures(profile: Path, labels: set[str]) -> str:
    """Return a page that lists the figures of a profile; those in ``labels`` stand in the book."""
    lines = [f"# All figures of {profile.relative_to(ROOT / 'figures')}"]
    for folder in sorted({png.parent for png in profile.rglob("*.png")}):
        lines += ["", f"## {folder.name.replace('_', ' ')}", ""]
        for png in sorted(folder.glob("*.png")):
            where = png.relative_to(ROOT / "figures").with_suffix("")
            ends = [end for end in ("pdf", "csv") if png.with_suffix(f".{end}").exists()]
            links = ", ".join(f"[{end}]({where}.{end})" for end in ends)
            label, name = f"figure-{profile.name}-{folder.name}-{png.stem}", png.stem
            if label in labels:
                name = f"[{name}](#{label})"
            lines.append(f"- {name}: {links}")
    return "\n".join(lines) + "\n"


def gather() -> None:
    """Write all pages, and the files that they link, into build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(DOCS / "_static", PAGES / "_static")
    shutil.copyfile(DOCS / "conf.py", PAGES / "conf.py")
    scripts = Path(mathjax.__file__).parent / "static/mathjax/es5/tex-svg.js"
    shutil.copyfile(scripts, PAGES / "_static/tex-svg.js")
    (PAGES / "_static/plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    (PAGES / "extra").mkdir()
    for name in ("films", "windows"):
        if (DOCS / name).exists():
            keep = shutil.ignore_patterns("*.md", "*.json")
            shutil.copytree(DOCS / name, PAGES / "extra/docs" / name, ignore=keep)
    parts, tocs, labels = pages(), [], set()
    known = {ROOT / "README.md", *(page for part in parts.values() for page in part)}
    for source in sorted(known):
        target = place(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text = with_links(source.read_text(encoding="utf-8"), source, known)
            if source.stem.startswith("see-"):
                text = see.filled(source, text)
            target.write_text(text, encoding="utf-8")
            continue
        notebook = with_results(source)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = with_links(cell.source, source, known)
                labels.update(re.findall(r"^\((figure-\S+)\)=", cell.source))
        nbformat.write(notebook, target)
    for title, part in parts.items():
        names = "\n".join(str(place(page).relative_to(PAGES).with_suffix("")) for page in part)
        tocs.append(f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n{names}\n```\n")
    listed = []
    for profile in sorted(
        path for path in (ROOT / "figures").glob("*/") if path.name not in ("mine", "smoke")
    ):
        page = PAGES / f"figures/{profile.name}.md"
        source = ROOT / f"figures/{profile.name}.md"
        page.write_text(with_links(list_figures(profile, labels), source, known), encoding="utf-8")
        listed.append(f"figures/{profile.name}")
    tocs.append("```{toctree}\n:hidden:\n:caption: All figures\n\n" + "\n".join(listed) + "\n```\n")
    with open(PAGES / "index.md", "a", encoding="utf-8") as index:
        index.write("\n" + "\n".join(tocs))


def main() -> None:
    """Build the book and say where its first page is. Ends with Sphinx's status."""
    profiles.load_profile(PROFILE)  # an unknown one is said now
    gather()
    shutil.rmtree(BOOK, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    status = subprocess.run([*command, str(PAGES), str(BOOK)]).returncode
    if status:
        raise SystemExit(status)
    for debugging in BOOK.rglob("*.map"):
        debugging.unlink()
    print(f"The book: {BOOK / 'index.html'}")


if __name__ == "__main__":
    main()
