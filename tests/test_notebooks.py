"""The real notebooks, by papermill, on the smoke profile: real data, training, rollouts and figures."""

import nbformat
import pytest

from dtlib import batch, runs

NOTEBOOKS = sorted((batch.repository() / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_repeats_itself(path, tmp_path, capfd):
    """Run twice: the second time every run is found, and the numbers are the same to the byte."""
    trained = []
    for attempt in ("first", "second"):
        batch.run("smoke", [path.stem], figures=str(tmp_path / attempt))
        trained.append({file: file.stat().st_mtime_ns for file in runs.runs_root().rglob("*") if file.is_file()})
    folders = [tmp_path / attempt / "smoke" / path.stem for attempt in ("first", "second")]
    numbers = [{file.name: file.read_bytes() for file in sorted(folder.glob("*")) if file.suffix in (".csv", ".json")}
               for folder in folders]
    assert numbers[0] == numbers[1] and len(numbers[0]) > 1
    assert trained[0] == trained[1]
    capfd.readouterr()  # progress bars


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_clean_and_short(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert max(len(cell.source.splitlines()) for cell in code) <= 40
