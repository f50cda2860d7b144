"""The texts that the user's modules run: as they were when they were imported or reloaded, whatever the files hold now.

In the notebook they are watched: a finder in front of all others reads each file at the moment at which it is imported
or reloaded, so the text is known also where the file is edited later. On an engine the same finder gives a module the
notebook's text, where its file holds another one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

from nbdist.engine.follow.libraries import is_users_module, library_folders
from nbdist.upstream.ipython_private import autoreloaded_text, reload_in_place

__all__ = ["ModuleText", "ModuleTexts", "watched_modules"]


@dataclass(frozen=True, kw_only=True)
class ModuleText:
    """The text that a module runs in the notebook.

    Args:
        name: The module's.
        file: From which it was read.
        text: What the file held.
        before: The text that the module ran before; None if it was imported just now.
        reloaded: Whether the module ran the text anew, which a module that has it already does too.
        in_place: Whether functions and classes that exist get it too, as with ``%autoreload``.
    """

    name: str
    file: str
    text: bytes
    before: bytes | None = None
    reloaded: bool = False
    in_place: bool = False


@dataclass
class _Known:
    """A module of this process: its file and text, the file's state when it was read, and the spec of that import."""

    file: str
    text: bytes
    stat: tuple[int, ...]
    spec: Any
    by_finder: bool
    is_noted: bool = False  # that the file holds another text now


class ModuleTexts:
    """Knows the texts of this process's modules that are the user's. Local, one a process.

    Attributes:
        noted: What has changed, one after the other; see `look`.
    """

    def __init__(self) -> None:
        self.noted: list[ModuleText] = []
        self._known: dict[str, _Known] = {}
        self._found: list[tuple[str, Any, tuple[int, ...], bytes | None]] = []  # perhaps to be imported
        self._others: set[str] = set()  # modules of libraries, and without a file
        self._given: dict[str, ModuleText] = {}
        self._giving = False
        self._failed: dict[str, str] = {}
        library_folders()  # which imports, before this is asked about imports
        sys.meta_path.insert(0, self)
        self._scan()
        self.noted.clear()

    # In the notebook, and on an engine.

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find a module as the finders behind this one do, and note its text; see `importlib.abc.MetaPathFinder`."""
        given = self._given.get(name)
        if given is not None and (self._giving or (target is None and _content(given.file) != given.text)):
            spec = _given_spec(given, target)
            self._known[name] = _Known(given.file, given.text, (), spec, True)
            return spec
        spec = self._found_behind(name, path, target)
        if spec is not None and is_users_module(spec.origin):
            self._found.append((name, spec, _stat(str(spec.origin)), _content(str(spec.origin))))
        return spec

    def _found_behind(self, name: str, path: Any, target: Any) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else []
        for finder in behind:
            find: Callable[..., ModuleSpec | None] | None = getattr(finder, "find_spec", None)
            if find is not None and (spec := find(name, path, target)) is not None:
                return spec
        return None

    def _note(self, name: str, spec: Any, stat: tuple[int, ...], text: bytes | None, *, by_finder: bool) -> None:
        """A module has run a text."""
        known, file = self._known.get(name), str(spec.origin)
        if known is not None and (text is None or not _is_python(text, file)):  # a reload then ran nothing of it
            known.spec = spec
            return
        if text is None:
            return
        before, by_finder = (None, by_finder) if known is None else (known.text, by_finder or known.by_finder)
        self._known[name] = _Known(file, text, stat, spec, by_finder)
        self.noted.append(
            ModuleText(
                name=name, file=file, text=text, before=before, reloaded=known is not None,
                in_place=known is not None and autoreloaded_text(name) is not None,
            )
        )  # fmt: skip

    def _scan(self) -> None:
        """Note modules that were imported or reloaded since, also past this finder."""
        found, self._found = self._found, []
        for name, spec, stat, text in found:
            if _spec_of(name) is spec:  # else it was only looked for, or has run another text since
                self._note(name, spec, stat, text, by_finder=True)
        for name in sys.modules.keys() - self._known.keys() - self._others:
            spec = _spec_of(name)
            if spec is None or not is_users_module(spec.origin):
                self._others.add(name)
            else:
                self._note(name, spec, _stat(spec.origin), _content(spec.origin), by_finder=False)

    # In the notebook.

    def look(self) -> None:
        """Note what has changed since: modules that are new, were reloaded, or whose file was edited without that."""
        self._scan()
        for name, known in list(self._known.items()):
            spec = _spec_of(name)
            if spec is not None and spec is not known.spec and is_users_module(spec.origin):
                self._note(name, spec, _stat(spec.origin), _content(spec.origin), by_finder=False)
            elif (stat := _stat(known.file)) != known.stat:
                known.stat = stat
                text = _content(known.file)
                if text is not None and text != known.text and _same_text(text, autoreloaded_text(name)):
                    self._note(name, known.spec, stat, text, by_finder=False)
                elif text != known.text and not known.is_noted:
                    known.is_noted = True
                    kept = ModuleText(name=name, file=known.file, text=known.text, before=known.text)
                    self.noted.append(kept)

    def since(self, count: int) -> list[ModuleText]:
        """What was noted after the first `count`, of modules that another process can import."""
        return [one for one in self.noted[count:] if self._can_be_imported(one)]

    def _can_be_imported(self, one: ModuleText) -> bool:
        from nbdist.core.transfer.importable import is_importable  # loads torch, which the notebook has by now

        module = sys.modules.get(one.name)
        known = self._known.get(one.name)
        return module is not None and ((known is not None and known.by_finder) or is_importable(module))

    def texts(self) -> list[ModuleText]:
        """The text that each module runs now, for an engine that may not see the files; see `since`."""
        self._scan()
        named = [ModuleText(name=name, file=known.file, text=known.text) for name, known in self._known.items()]
        return [one for one in named if self._can_be_imported(one)]

    # On an engine.

    def give(self, one: ModuleText) -> None:
        """Let a module run the notebook's text: at once if it is imported here, else when it will be. Local."""
        self._scan()
        self._given[one.name] = one
        module, known = sys.modules.get(one.name), self._known.get(one.name)
        if module is not None and (one.reloaded or known is None or known.text != one.text):
            self._failed[one.name] = ""

    def reload(self) -> list[str]:
        """Reload the modules that were given another text; returns a sentence for each that cannot be. Local."""
        for name in list(self._failed):
            if name not in sys.modules:
                del self._failed[name]
                continue
            given = self._given[name]
            try:
                with self._given_to_all():
                    (reload_in_place if given.in_place else importlib.reload)(sys.modules[name])
                del self._failed[name]
            except Exception as error:  # the module may raise anything
                self._failed[name] = (
                    f"module {name} has run again in the notebook, but raises {type(error).__name__} here ({error}): "
                    "mend it and reload it there, or start the engines anew (%dist_stop, %dist_start)."
                )
        return self.failures

    @property
    def failures(self) -> list[str]:
        """A sentence for each module that cannot be reloaded."""
        return [sentence for sentence in self._failed.values() if sentence]

    @contextlib.contextmanager
    def _given_to_all(self) -> Iterator[None]:
        self._giving = True
        try:
            yield
        finally:
            self._giving = False


@functools.cache
def watched_modules() -> ModuleTexts:
    """The modules of this process, watched from the first call on."""
    return ModuleTexts()


class _GivenLoader(SourceFileLoader):
    """Loads a module from a text in place of its file's, which may not be there; nothing is cached."""

    def __init__(self, name: str, file: str, text: bytes) -> None:
        super().__init__(name, file)
        self._text = text

    def get_data(self, path: Any) -> bytes:
        """See `importlib.abc.ResourceLoader`."""
        return self._text if str(path) == self.path else super().get_data(path)

    def path_stats(self, path: Any) -> Any:
        """See `importlib.abc.SourceLoader`; without it no cached code is looked for."""
        raise OSError(f"{path} is not what this module runs")


def _given_spec(given: ModuleText, target: Any) -> ModuleSpec | None:
    """The spec of a module that runs a given text; of a package it finds the submodules where the old one did."""
    folders = getattr(target, "__path__", None)
    if folders is None and os.path.basename(given.file) == "__init__.py":
        folders = [os.path.dirname(given.file)]
    loader: Any = _GivenLoader(given.name, given.file, given.text)
    return spec_from_file_location(
        given.name, given.file, loader=loader, submodule_search_locations=None if folders is None else list(folders)
    )


def _spec_of(name: str) -> Any:
    """The spec with which a module was imported, or reloaded last; None for the program itself."""
    return None if name in ("__main__", "__mp_main__") else getattr(sys.modules.get(name), "__spec__", None)


def _stat(file: str) -> tuple[int, ...]:
    try:
        found = os.stat(file)
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _content(file: str) -> bytes | None:
    try:
        return Path(file).read_bytes()
    except OSError:
        return None


def _is_python(text: bytes, file: str) -> bool:
    try:
        compile(text, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def _same_text(content: bytes, text: str | None) -> bool:
    """Whether a file's content is a text, whose line ends may have been read as one."""
    if text is None:
        return False
    with contextlib.suppress(UnicodeDecodeError):
        return "\n".join(content.decode().splitlines()) == "\n".join(text.splitlines())
    return False
