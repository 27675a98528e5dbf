"""Sparse Transformers for plain CPUs. After `import sparsecli`, transformers' Auto classes know the models."""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from sparsecli import model

__version__ = "0.1.0"

_REGISTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": model.register_config,
    "transformers.models.auto.modeling_auto": model.register,
}


class _RegisterOnImport:
    """Registers the models right after transformers' Auto modules run; importing those here would cost a second.

    Where it is one of our own modules that had them imported, registering waits until that is whole.
    """

    def __init__(self) -> None:
        self.under_way: set[str] = set()
        self.waiting: list[Callable[[], None]] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = name.startswith(f"{model.__name__}.")
        spec = PathFinder.find_spec(name, path) if ours or name in _REGISTER else None
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                if ours:
                    self.under_way.add(name)
                try:
                    execute(module)
                finally:
                    self.under_way.discard(name)
                self.register_after(name)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

    def register_after(self, name: str) -> None:
        """Do what the module `name`, which has been imported, allows to be done."""
        if name in _REGISTER:
            self.waiting.append(_REGISTER[name])
        while self.waiting and not self.under_way:
            self.waiting.pop()()


_hook = _RegisterOnImport()
sys.meta_path.insert(0, _hook)
for _name in _REGISTER:
    if _name in sys.modules:
        _hook.register_after(_name)
