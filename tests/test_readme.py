"""What the README says is so."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_train_loop_runs_and_learns(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 55
    exec(compile(code, "README.md", "exec"), {})
    loss, accuracy = re.match(r"loss (\S+), accuracy (\S+)", capsys.readouterr().out).groups()
    assert float(loss) < 0.5
    assert float(accuracy) == 1.0


def test_the_rooms_are_all_listed_and_exist():
    rooms = r"^\| `((?:jaxpref|configs|benchmarks|tests)/[^`]*)` \|"
    listed = set(re.findall(rooms, README, re.MULTILINE))
    assert all((ROOT / room).exists() for room in listed)
    package = {
        f"jaxpref/{path.name}{'/' if path.is_dir() else ''}"
        for path in (ROOT / "jaxpref").iterdir()
        if not path.name.startswith("_") and path.name != "py.typed"
    }
    assert package <= listed


@pytest.mark.parametrize("name", ["sft.py", "dpo.py", "method.py", "sft_hh.py", "dpo_hh.py"])
def test_recipes_it_names_exist(name):
    assert f"configs/{name}" in README
    assert (ROOT / "configs" / name).exists()


def test_make_targets_it_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (quickstart|test|check)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
