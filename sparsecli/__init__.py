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
    """Registers the models right after transformers' Auto modules run; importing those here would cost a second."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in _REGISTER else None
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _REGISTER[name]()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _RegisterOnImport())
for _name, _register in _REGISTER.items():
    if _name in sys.modules:
        _register()
