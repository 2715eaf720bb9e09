"""Notebooks, as they are kept: without outputs, and with code that could run. Nothing is run here.

`python tests/test_notebooks.py` takes out what running and saving them has left in them.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def stripped(text):
    """The notebook without outputs, counts of executions, and what an editor notes down."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell |= {"execution_count": None, "outputs": []}
    notebook["metadata"] = METADATA
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def sources(path, kind):
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@by_notebook
def test_it_is_kept_without_outputs(path):
    text = path.read_text()
    assert text == stripped(text), f"run: python {Path(__file__).relative_to(ROOT)}"
    assert not re.search(r"/(home|Users|root|tmp|work|mnt)/", text)


@by_notebook
def test_it_is_a_valid_notebook(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    if importlib.util.find_spec("nbformat"):
        import nbformat

        nbformat.validate(notebook)


@by_notebook
def test_its_code_compiles_and_is_explained(path):
    for number, source in enumerate(sources(path, "code")):
        compile(source, f"{path.name}, code cell {number}", "exec")
    assert sources(path, "markdown")[0].startswith("# ")
    assert len(sources(path, "markdown")) > 5


@by_notebook
def test_what_it_points_to_exists(path):
    text = "\n".join(sources(path, "markdown"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        assert link.startswith("https://") or (path.parent / link).exists(), link
    for said, linked in re.findall(r"arXiv\s+([\d.]+)\]\(https://arxiv.org/abs/([\d.]+)\)", text):
        assert said == linked
    for record in re.findall(r"configs/[\w/]+\.py", text):
        assert (ROOT / record).exists(), record


def test_the_readme_lists_them_by_number_and_title():
    listed = re.findall(r"^\| \[(\d)\. ([^]]+)\]\((notebooks/[^)]+)\) \|", readme(), re.MULTILINE)
    titles = [sources(path, "markdown")[0].partition("\n")[0][2:] for path in NOTEBOOKS]
    names = [str(path.relative_to(ROOT)) for path in NOTEBOOKS]
    numbers = [str(int(path.name[:2])) for path in NOTEBOOKS]
    assert numbers == [str(number) for number in range(1, len(NOTEBOOKS) + 1)]
    assert listed == list(zip(numbers, titles, names, strict=True))


def readme():
    return (ROOT / "README.md").read_text()


if __name__ == "__main__":
    for notebook in NOTEBOOKS:
        notebook.write_text(stripped(notebook.read_text()))
