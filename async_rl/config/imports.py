"""Python objects that a setting names: a task, a reward, a tool or a recipe of the user's own.

A name is `module:object` or `path/file.py:object`, for example `my_package.rewards:length` or `task.py:MyTask`.
`located` resolves a name once, where the config file is known; `load_object` and `load_function` import it, in every
process alike; `import_name` makes the name of an object that a Python program holds.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from async_rl.errors import UserError, nearest

Found = TypeVar("Found")
PLAIN_MODULE = "__main__"
"""the name of a program's own file, which no other process can import"""
DATA_FILES = (".yaml", ".yml")
"""endings of files that a setting may name instead of an object: a recipe as data"""
NAMING_SETTINGS = (
    "task.name",
    "task.args.reward",
    "task.args.group_reward",
    "task.args.tool",
    "task.args.env",
    "task.args.environment",
    "task.args.tell",
    "task.args.view",
    "task.args.opponent",
    "recipe.name",
)
"""settings that may name an object of the user's own"""
COUNTS = ("no", "one", "two", "three", "four")


_importing: list[str] = []
"""modules and files of the user that are being imported now"""


class ImportStopped(BaseException):
    """Ends the import of a file at the call named in the message. No Exception: a program that guards itself against
    exceptions must not swallow it."""


def stop_import(call: str) -> None:
    """End the import of the user's file here, if one is being imported; otherwise do nothing.

    A script that defines a task and trains with it is imported by the processes of its own run, which need the task
    and must not train again. `train` and its like call this first, so no `if __name__ == "__main__":` is needed.
    """
    if _importing:
        raise ImportStopped(call)


def is_import(name: str) -> bool:
    """True for `module:object` and `file.py:object`, and for a file's name that lacks the object."""
    return ":" in name or name.endswith(".py")


def load_object(name: str, *, where: str, what: str = "object") -> Any:
    """The object called `name`.

    A module is imported with the working directory on `sys.path`. A relative file is looked up in the working
    directory, then in the folders of `sys.path`. Files and folders beside the object's own file can be imported by it.

    Args:
        where: the setting that holds the name, for messages, e.g. "task.name 'task.py:Mine'".
        what: the kind of object, for messages: "function", "class".

    Raises:
        UserError: the module or file is missing or raises, or it holds no such object.
    """
    source, colon, path = name.rpartition(":")
    if not colon or not path:
        raise UserError(f"{where}: name the {what} in it too, as {name.rstrip(':')}:NAME")
    module = _from_file(source, where) if source.endswith(".py") else _from_path(source, where)
    found: Any = module
    for part in path.split("."):
        holder, found = found, getattr(found, part, None)
        if found is None:
            known = [key for key, value in vars(holder).items() if callable(value) and not key.startswith("_")]
            raise UserError(f"{where}: '{source}' has no {what} '{path}'; {nearest(part, known)}")
    return found


def load_function(name: str, *, where: str, arguments: str) -> Callable[..., Any]:
    """The function called `name`, which takes `arguments`, e.g. "(completion, answer, problem)".

    Raises UserError as `load_object` does, and for an object that is no function of so many arguments.
    """
    function = load_object(name, where=where, what="function")
    source, _, path = name.rpartition(":")
    if not callable(function):
        raise UserError(f"{where}: '{source}' has no function '{path}'; it is {function!r:.40}")
    try:
        inspect.signature(function).bind(*arguments.split(","))
    except TypeError:
        raise UserError(f"{where}: it must take {COUNTS[arguments.count(',') + 1]} arguments: {arguments}") from None
    except ValueError:
        pass  # a builtin has no signature
    found: Callable[..., Any] = function
    return found


def located(name: str, folder: Path) -> str:
    """`name` with the path of its file where that file lies in `folder`, the folder of the config file.

    The path is relative where the working directory holds the file, so that a config of the run stays valid on another
    machine. Other names come back as they are. Example: `task.py:Mine` in `examples/` -> `examples/task.py:Mine`.
    """
    source, colon, path = name.rpartition(":")
    if name.endswith(DATA_FILES):
        source, relative = name, name
    elif not colon:
        return name
    else:
        relative = source if source.endswith(".py") else source.replace(".", "/") + ".py"
    here = Path.cwd()
    if colon and source.isidentifier() and not (folder / relative).is_file() and (here / relative).is_file():
        return f"{relative}:{path}"  # as a file, since an import would prefer a module of that name on the path
    file = (folder / relative).resolve()
    if Path(relative).is_absolute() or not file.is_file() or _on_path(relative, file):
        return name
    if file == (here / relative).resolve():
        return f"{relative}:{path}" if colon and source.isidentifier() else name
    found = str(file.relative_to(here) if file.is_relative_to(here) else file)
    return f"{found}:{path}" if colon else found


def _on_path(relative: str, file: Path) -> bool:
    """Whether PYTHONPATH leads to `file`, in every process of a run, so that its name needs no folder."""
    found = (Path(folder, relative) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder)
    return next((path.resolve() == file for path in found if path.is_file()), False)


def locate_all(values: dict[str, Any], folder: Path) -> None:
    """Apply `located` to every setting in `values` that may hold a name (NAMING_SETTINGS), in place."""
    for path in NAMING_SETTINGS:
        *groups, last = path.split(".")
        group: Any = values
        for name in groups:
            group = group.get(name) if isinstance(group, dict) else None
        named = group.get(last) if isinstance(group, dict) else None
        if isinstance(named, str):
            group[last] = located(named, folder)
        elif isinstance(named, list):
            group[last] = [located(name, folder) if isinstance(name, str) else name for name in named]


def import_name(found: Any) -> str:
    """The name under which another process can load the class or function `found`; the inverse of `load_object`.

    Raises UserError for one that no other process can import: defined inside a function, or in an interactive session.
    """
    path = getattr(found, "__qualname__", type(found).__qualname__)
    module = sys.modules.get(getattr(found, "__module__", ""))
    if module is None or not hasattr(found, "__qualname__"):
        raise UserError(
            f"{found!r:.60} is neither a class nor a function; give one of these, or its name module:object"
        )
    if "<" in path:
        raise UserError(f"{path} is defined inside a function, where no other process can find it; move it to a module")
    file = getattr(module, "__file__", None)
    if file is not None and file.endswith(".py") and "." not in module.__name__ and not hasattr(module, "__path__"):
        return f"{Path(file).resolve()}:{path}"
    if module.__name__ == PLAIN_MODULE:
        raise UserError(f"{path} is defined in no file, where no other process can find it; move it to a module")
    return f"{module.__name__}:{path}"


def find_source(name: str, *, where: str) -> Path | None:
    """The file in which the object `name` stands; None for one that stands in no file of Python. A module is not
    imported, the packages around it are. Raises UserError when it is not there. `where`: as in `load_object`."""
    source = name.rpartition(":")[0] or name
    if source.endswith(".py"):
        return _find_file(source, where)
    _look_in_working_directory()
    spec = _imported(lambda: importlib.util.find_spec(source), source, where)
    if spec is None:
        raise UserError(
            f"{where}: there is no module '{source}' beside the config file, in {Path.cwd()} or on the path"
        )
    return Path(spec.origin) if spec.origin is not None and spec.origin.endswith(".py") else None


def _find_file(source: str, where: str) -> Path:
    given = Path(source).expanduser()
    places = [Path.cwd(), *map(Path, sys.path)]
    file = next((file for folder in places if (file := folder / given).is_file()), None)
    if file is None:
        raise UserError(
            f"{where}: there is no file {given} (relative paths start at the config file, {Path.cwd()} or on sys.path)"
        )
    return file.resolve()


def _look_in_working_directory() -> None:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # an installed command does not look there; last, so that it hides nothing


def _from_path(source: str, where: str) -> ModuleType:
    """The module `source`, imported with the working directory on the path."""
    _look_in_working_directory()
    return _imported(lambda: importlib.import_module(source), source, where)


def _from_file(source: str, where: str) -> ModuleType:
    """The module in the file `source`. It is imported under its plain name unless another module has that name."""
    file = _find_file(source, where)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))

    program = getattr(sys.modules.get(PLAIN_MODULE), "__file__", None)
    if program is not None and Path(program).resolve() == file:
        return sys.modules[PLAIN_MODULE]  # the program that runs is this file: its classes exist already

    def load() -> ModuleType:
        spec = importlib.util.find_spec(file.stem) if file.stem.isidentifier() and file.stem != PLAIN_MODULE else None
        plain = spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file
        name = file.stem if plain else f"_{file.stem}_{blake2b(bytes(file), digest_size=8).hexdigest()}"
        if name in sys.modules:
            return sys.modules[name]
        spec = spec if plain else importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except ImportStopped:
            pass  # what stands above the call is defined
        except BaseException:
            del sys.modules[name]
            raise
        return module

    return _imported(load, source, where)


def _imported(load: Callable[[], Found], source: str, where: str) -> Found:
    importlib.invalidate_caches()  # the file may have been written a moment ago
    _importing.append(source)
    arguments, sys.argv = sys.argv, [source]  # those of this process are none of the user's
    try:
        return load()
    except ImportStopped as stopped:
        raise UserError(
            f"{where}: importing '{source}' calls {stopped}; put that call under `if __name__ == \"__main__\":`"
        ) from None
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is imported
        raise UserError(f"{where}: cannot import '{source}': {type(error).__name__}: {error}") from error
    finally:
        sys.argv = arguments
        _importing.pop()
