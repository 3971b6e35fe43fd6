"""What README.md and docs/ show runs, resolves, and is what the rows and the sources give."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from amalgam import recipes, tasks

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TEXTS = {name: page.read_text(encoding="utf-8") for name, page in zip(NAMES, PAGES, strict=True)}

of_pages = pytest.mark.parametrize("page", NAMES)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE)


def script(name: str) -> ModuleType:
    path = ROOT / "docs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(block: str) -> dict:
    """The names that a block defines; dataclasses look for the module that they are of."""
    module = sys.modules.setdefault("block", ModuleType("block"))
    names = vars(module)
    exec(compile(block, "block", "exec"), names)
    return names


# What code shows.


@of_pages
def test_python_compiles_and_toml_is_read(page: str) -> None:
    for block in blocks(page, "python"):
        compile(block, page, "exec")
    for block in blocks(page, "toml"):
        tomllib.loads(block)


def test_training_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("README.md", "python")
    torch.manual_seed(0)
    names = run(block)
    assert names["accuracy"] > 0.87
    assert names["optimizer"].skipped_steps == 0
    assert "of 297 images" in capsys.readouterr().out


def test_meta_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks("docs/meta-training.md", "python")
    monkeypatch.chdir(tmp_path)
    small = block.replace("episodes=20, windows=2", "episodes=1, windows=2")
    small = small.replace("Stage(20, 5, 0.1)", "Stage(1, 1, 0.1)").replace("unroll=20", "unroll=3")
    assert small.count("1, ") > block.count("1, ")
    names = run(small)
    assert names["student"].provenance["meta_steps"] == 3
    assert (tmp_path / "runs" / "mine" / "student.safetensors").exists()


def test_estimating_memory(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("docs/training.md", "python")
    run(block)
    assert "40" in capsys.readouterr().out


def test_a_family_of_ones_own() -> None:
    (block,) = (block for block in blocks("docs/families.md", "python") if "class Signs" in block)
    family = run(block)["Signs"](batch_size=16)
    assert isinstance(family, tasks.TaskFamily)
    assert family.draw(torch.Generator().manual_seed(0)).batch_size == 16


def test_commands_are_the_ones_that_ci_and_users_run() -> None:
    readme = TEXTS["README.md"]
    assert "\npip install -c constraints.txt . && amalgam train digits\n" in readme
    assert "\npip install -c constraints.txt -e '.[test]' && python -m pytest -n 2\n" in readme


# Links.


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", outside, re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {word.strip().replace(" ", "-") for word in words}


def links(text: str) -> Iterator[str]:
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", outside)):
        if "://" not in target:
            yield target


@of_pages
def test_links_resolve(page: str) -> None:
    for target in links(TEXTS[page]):
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        # A folder has no page of its own on the site.
        assert path.is_file(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page} links to {target}"


def test_the_site_has_every_page() -> None:
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [name for name in NAMES if f": {name}\n" not in listed] == []


def test_the_reference_names_modules_that_are_there() -> None:
    named = [
        module for page in NAMES for module in re.findall(r"^::: (\S+)$", TEXTS[page], re.MULTILINE)
    ]
    assert "amalgam.optimizers" in named
    for module in named:
        assert importlib.util.find_spec(module) is not None, module


# Figures.


@of_pages
def test_tables_are_what_their_rows_give(page: str) -> None:
    if "<!-- table: " not in TEXTS[page]:
        return
    assert script("tables").written(TEXTS[page]) == TEXTS[page], "run python docs/tables.py"


def test_a_table_that_was_edited_is_found() -> None:
    page = "docs/performance.md"
    edited = TEXTS[page].replace("| 45.7 |", "| 35.7 |")
    assert edited != TEXTS[page]
    assert script("tables").written(edited) == TEXTS[page]


def test_the_picture_is_drawn_from_the_rows() -> None:
    module = script("tables")
    drawn = Image.open(ROOT / "docs" / "optimizers.png").text["Description"]  # type: ignore[attr-defined]
    assert drawn == module.described(), "run python docs/tables.py"
    line = next(line for line in drawn.splitlines() if line.startswith("standard "))
    assert f"| {line.replace(' ', ' | ', 1)} |" not in drawn
    assert line.split(" ", 1)[1] in TEXTS["README.md"]


# What is listed.


def test_recipes_and_tasks_are_all_listed() -> None:
    for name in recipes.shipped():
        assert f"[{name}](../amalgam/recipes/{name}.toml)" in TEXTS["docs/recipes.md"]
    named = set(re.findall(r"`([\w-]+)`", TEXTS["docs/tasks.md"]))
    prefixes = [name for name in named if not name.startswith("-")]
    for name in tasks.TASKS:
        ends = (prefix + end for prefix in ("quadratic", "rastrigin") for end in named)
        assert name in prefixes or name in ends, name


def variables(path: Path) -> set[str]:
    """The environment variables that a source file reads."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return set(re.findall(r'getenv\("(\w+)"\)', text))
    access = r"environ(?:ment)?(?:\.get\(|\.setdefault\(|\.pop\(|\[)"
    found = set(re.findall(rf'{access}"(\w+)"', text)) | set(
        re.findall(r'"(\w+)" (?:not )?in os.environ', text)
    )
    for constant in re.findall(rf"{access}([A-Z]+)\b", text):
        found |= set(re.findall(rf'^{constant} = "(\w+)"', text, re.MULTILINE))
    return found


def test_every_environment_variable_is_on_its_page() -> None:
    page = TEXTS["docs/environment.md"]
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]
    for folder in ("amalgam", "kernels", "bench", "tests"):
        sources += (ROOT / folder).rglob("*.py")
    read = {name for path in sources for name in variables(path)}
    assert {"AMALGAM_TRITON", "AMALGAM_CPU_ISA", "AMALGAM_CUDA", "RANK"} <= read
    assert {name for name in read if f"`{name}`" not in page} <= {"PATH", "PYTHONPATH"}
    own = set(re.findall(r"`(AMALGAM_\w+)`", page))
    assert own == {name for name in read if name.startswith("AMALGAM_")}


def rooms_imported(node: ast.AST) -> Iterator[str]:
    """The rooms of the package that a module imports when it is imported itself."""
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module == "amalgam":
        modules = [f"amalgam.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [node.module or ""]
    else:
        # Functions import later, and `if TYPE_CHECKING` never.
        if not isinstance(node, ast.FunctionDef | ast.If):
            for inner in ast.iter_child_nodes(node):
                yield from rooms_imported(inner)
        return
    yield from (name.split(".")[1] for name in modules if name.startswith("amalgam."))


def test_rooms_import_from_lower_floors_alone() -> None:
    house = script("house")
    floors = {
        room: -index for index, floor in enumerate(house.FLOORS) for room, _ in floor
    } | dict.fromkeys(house.GROUND, -len(house.FLOORS))
    drawn = (ROOT / "docs" / "house.svg").read_text(encoding="utf-8")
    missing = [
        room for floor in house.FLOORS for room, _ in floor if f">{room}</text>" not in drawn
    ]
    assert missing == [], "run python docs/house.py"
    modules = [
        (path, path.relative_to(ROOT / "amalgam").parts[0])
        for path in (ROOT / "amalgam").rglob("*.py")
    ]
    modules += [(path, "kernels") for path in (ROOT / "kernels").glob("*.py")]
    for path, name in modules:
        room = name.removesuffix(".py")
        if room == "__init__":
            continue
        for other in rooms_imported(ast.parse(path.read_text(encoding="utf-8"))):
            if other != room and not {room, other} <= house.GROUND:
                assert floors[other] < floors[room], f"{path.relative_to(ROOT)} imports {other}"
