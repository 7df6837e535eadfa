"""Give the executed notebooks in figures/ today's text, without running anything.

    python scripts/refresh_prose.py            # figures/**/executed.ipynb, those that can be

The Markdown of notebooks/NAME.ipynb replaces that of each copy; cells are matched by their id. Code
cells and what they showed stay as they are. A copy whose code is not today's is named and left
alone: its text would speak of other code. Run it after changes of text alone; changed code needs
`python -m dtlib figures`.
"""

from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dtlib.batch import read_notebook, with_links
from dtlib.errors import UserError
from dtlib.storage import repository, write_text

INJECTED = ["injected-parameters"]  # papermill's cell: a copy has it, a notebook does not


def refreshed(copy: NotebookNode, today: NotebookNode, home: Path, folder: Path) -> bool:
    """Put the Markdown of ``today``, which stands in ``home``, into ``copy``, in ``folder``.

    Returns whether the code of both is the same; if not, nothing was changed.
    """
    code = [cell for cell in copy.cells if cell.cell_type == "code"]
    injected = [cell for cell in code if cell.metadata.get("tags") == INJECTED]
    own = [cell for cell in code if cell not in injected]
    of_today = [cell for cell in today.cells if cell.cell_type == "code"]
    if [(c.id, c.source) for c in own] != [(c.id, c.source) for c in of_today]:
        return False
    left, copy.cells = iter(own), []
    for cell in today.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code":
            copy.cells += [next(left), *(injected if "parameters" in tags else [])]
        else:
            text = nbformat.from_dict(cell | {"metadata": {"tags": tags} if tags else {}})
            text.source = with_links(text.source, home, folder)
            copy.cells.append(text)
    return True


def main() -> None:
    """Refresh all copies; print the folder of each that changed or was left alone."""
    home = repository() / "notebooks"
    for path in sorted((repository() / "figures").rglob("executed.ipynb")):
        try:
            copy = read_notebook(path)
            today = read_notebook(home / f"{path.parent.name}.ipynb")
        except UserError as error:
            print(f"{path.parent}: left alone. {error}")
            continue
        before = path.read_text(encoding="utf-8")
        where = path.parent.relative_to(repository())
        if not refreshed(copy, today, home, path.parent):
            print(f"{where}: left alone, its code is not today's")
        elif (text := nbformat.writes(copy) + "\n") != before:
            write_text(path, text)
            print(f"{where}: today's text")


if __name__ == "__main__":
    main()
