"""Names of the user's own objects: found in files and modules, refused with a sentence, made from objects."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_rl.config.imports import import_name, is_import, load_function, load_object, locate_all, located
from async_rl.errors import UserError

WHERE = "task.name 'x'"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with files of the user's own."""
    (tmp_path / "own_for_imports_test.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import beside_for_imports_test\n"
        "@dataclass(slots=True)\n"
        "class Mine:\n"
        "    limit: int = 3\n"
        "    class Inner: pass\n"
        "def double(x): return 2 * x\n"
        "LIMIT = 3\n"
    )
    (tmp_path / "beside_for_imports_test.py").write_text("VALUE = 1\n")
    (tmp_path / "broken_for_imports_test.py").write_text("raise RuntimeError('no licence')\n")
    (tmp_path / "leaving_for_imports_test.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "json.py").write_text("def mine(): return 'mine'\n")  # a name that the standard library has
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("source", ["own_for_imports_test", "own_for_imports_test.py", "./own_for_imports_test.py"])
def test_a_module_and_its_file_give_the_same_object(folder: Path, source: str) -> None:
    mine = load_object(f"{source}:Mine", where=WHERE)
    assert mine().limit == 3
    assert mine is load_object(f"{folder}/own_for_imports_test.py:Mine", where=WHERE)
    assert load_object(f"{source}:Mine.Inner", where=WHERE) is mine.Inner
    assert load_function(f"{source}:double", where=WHERE, arguments="(x)")(4) == 8


def test_a_file_on_the_path_is_found_and_may_import_what_lies_beside_it(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    sys.path.append(str(folder))
    assert load_object("own_for_imports_test.py:Mine", where=WHERE)().limit == 3


def test_a_file_with_the_name_of_an_installed_module_hides_nothing(folder: Path) -> None:
    import json

    assert load_object("json.py:mine", where=WHERE)() == "mine"
    assert load_object("json.py:mine", where=WHERE) is load_object(f"{folder}/json.py:mine", where=WHERE)
    assert sys.modules["json"] is json
    assert not hasattr(json, "mine")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_file.py:Mine", "there is no file no_such_file.py"),
        ("no_such_module:Mine", "cannot import 'no_such_module': ModuleNotFoundError"),
        ("own_for_imports_test.py", "name the class in it too, as own_for_imports_test.py:NAME"),
        ("own_for_imports_test:", "name the class in it too"),
        ("own_for_imports_test.py:Min", "has no class 'Min'; did you mean 'Mine'"),
        ("own_for_imports_test.py:Mine.Iner", "has no class 'Mine.Iner'; did you mean 'Inner'"),
        ("broken_for_imports_test.py:Mine", "cannot import .*no licence"),
        ("leaving_for_imports_test.py:Mine", "cannot import .*SystemExit: 3"),
        (":Mine", "cannot import ''"),
    ],
)
def test_an_object_that_cannot_be_had_is_named_with_the_reason(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"{WHERE}: .*{message}|{WHERE}: {message}"):
        load_object(name, where=WHERE, what="class")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("own_for_imports_test:LIMIT", "(x)", "no function 'LIMIT'; it is 3"),
        ("own_for_imports_test:double", "(x, y)", r"must take two arguments: \(x, y\)"),
    ],
)
def test_a_function_is_called_as_it_will_be_called(folder: Path, name: str, arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_function(name, where=WHERE, arguments=arguments)


def test_a_name_is_located_beside_the_config_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "task.py").write_text("")
    assert located("task.py:Mine", inner) == located("task:Mine", inner) == "inner/task.py:Mine"
    assert located("task.py:Mine", folder) == "task.py:Mine"  # not there: as it stands
    assert located("guess", inner) == "guess"
    monkeypatch.chdir(inner)
    assert located("task.py:Mine", inner) == "task.py:Mine"
    assert located("own_for_imports_test:Mine", folder) == f"{folder.resolve()}/own_for_imports_test.py:Mine"
    assert located(f"{inner}/task.py:Mine", folder) == f"{inner}/task.py:Mine"


def test_what_is_an_import_and_what_a_plain_name() -> None:
    assert is_import("task.py")
    assert is_import("a.b:c")
    assert not is_import("guess")


def test_the_name_of_an_object_leads_back_to_it(folder: Path) -> None:
    for found in (load_object("own_for_imports_test:Mine", where=WHERE), Path, UserError, load_function):
        assert load_object(import_name(found), where=WHERE) is found
    with pytest.raises(UserError, match="inside a function"):
        import_name(lambda: 0)
    with pytest.raises(UserError, match="neither a class nor a function"):
        import_name(3)


def test_the_name_of_a_programs_own_class_is_that_of_its_file(folder: Path) -> None:
    script = folder / "program_for_imports_test.py"
    script.write_text(
        "from async_rl.config.imports import import_name, load_object\n"
        "class Mine: pass\n"
        "if __name__ == '__main__':\n"
        "    print(import_name(Mine), load_object(import_name(Mine), where='x').__name__)\n"
    )
    done = subprocess.run([sys.executable, script.name], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stdout.split() == [f"{script.resolve()}:Mine", "Mine"]


def test_every_setting_that_names_an_object_is_located(folder: Path) -> None:
    (folder / "mine.py").write_text("")
    inner = folder / "inner"
    inner.mkdir()
    (inner / "mine.py").write_text("")
    values = {"task": {"name": "dataset", "args": {"reward": "mine.py:f", "tool": "mine:g", "path": "mine.py"}}}
    values |= {"recipe": {"name": "mine.py:recipe"}, "seed": 3}
    locate_all(values, inner)
    assert values == {
        "task": {
            "name": "dataset",
            "args": {"reward": "inner/mine.py:f", "tool": "inner/mine.py:g", "path": "mine.py"},
        },
        "recipe": {"name": "inner/mine.py:recipe"},
        "seed": 3,
    }
