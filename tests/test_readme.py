"""What the README, and the pages that it points to, say is so."""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

from jaxpref.knobs import KNOBS
from jaxpref.methods import METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def test_the_train_loop_runs_and_learns(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 55
    exec(compile(code, "README.md", "exec"), {})
    loss, accuracy = re.match(r"loss (\S+), accuracy (\S+)", capsys.readouterr().out).groups()
    assert float(loss) < 0.5
    assert float(accuracy) == 1.0


def test_the_rooms_are_listed_from_top_to_bottom_and_exist():
    house = (ROOT / "docs" / "house.md").read_text()
    rooms = r"^\| `((?:jaxpref|configs|benchmarks|notebooks|tests|docs)/[^`]*)` \|"
    listed = re.findall(rooms, house, re.MULTILINE)
    assert all((ROOT / room).exists() for room in listed)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    # `lint-imports` sees to it that these layers are all of the package.
    layers = [layer.split(" | ") for layer in contracts["contracts"][0]["layers"]]
    depth = {name: number for number, names in enumerate(layers) for name in names}
    package = [Path(room).stem for room in listed if room.startswith("jaxpref/")]
    assert sorted(package) == sorted(depth)
    assert package == sorted(package, key=depth.__getitem__)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-").lower() for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_to_files_and_anchors_that_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        there = ROOT / page if not path else (ROOT / page).parent / path
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_every_page_is_one_click_from_the_readme():
    assert {page for page in PAGES if f"]({page})" in README} == {*PAGES} - {"README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_knobs_and_recipes_it_names_exist(page):
    text = (ROOT / page).read_text()
    groups = "|".join({key.partition(".")[0] for key in KNOBS} | {"algorithm"})
    own = {f"algorithm.{knob}" for method in METHODS.values() for knob in method.knobs}
    known = {*KNOBS, *own, "algorithm.name"}
    named = re.findall(rf"(?:`|--config\.)((?:{groups})\.(?!py`)[a-z0-9_.*]+)(?=[=`\s])", text)
    for key in named:
        assert fnmatch.filter(known, key), key
    for recipe in re.findall(r"configs/\w+\.py", text):
        assert (ROOT / recipe).exists(), recipe


@pytest.mark.parametrize("name", ["sft.py", "dpo.py", "method.py", "sft_hh.py", "dpo_hh.py"])
def test_recipes_it_names_exist(name):
    assert f"configs/{name}" in README
    assert (ROOT / "configs" / name).exists()


def test_make_targets_it_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
