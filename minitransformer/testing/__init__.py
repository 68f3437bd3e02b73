"""Testing gradients and attention: strategies that draw problems, the laws, the bug zoo, adapters to other frameworks.

`gradcheck` and `check_backends` need nothing more; what draws problems needs Hypothesis, the extra `test`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minitransformer.errors import require

if TYPE_CHECKING:
    from minitransformer.gradients import gradcheck
    from minitransformer.testing import adapters, bugs, laws, strategies
    from minitransformer.testing.backends import check_backends
    from minitransformer.testing.bugs import mutation_score
    from minitransformer.testing.laws import check_laws
    from minitransformer.testing.problems import attention_problems

# Each name and the module that holds it, imported when first asked for: the checks that need no
# Hypothesis do not import it, and who wants one law does not wait for all the rest.
_HOLDERS = {
    "adapters": "testing.adapters",
    "attention_problems": "testing.problems",
    "bugs": "testing.bugs",
    "check_backends": "testing.backends",
    "check_laws": "testing.laws",
    "gradcheck": "gradients",
    "laws": "testing.laws",
    "mutation_score": "testing.bugs",
    "strategies": "testing.strategies",
}

__all__ = [
    "adapters",
    "attention_problems",
    "bugs",
    "check_backends",
    "check_laws",
    "gradcheck",
    "laws",
    "mutation_score",
    "strategies",
]


def __getattr__(name: str) -> Any:
    if name not in _HOLDERS:
        raise AttributeError(f"module 'minitransformer.testing' has no attribute {name!r}")
    try:
        module = import_module(f"minitransformer.{_HOLDERS[name]}")
    except ModuleNotFoundError as error:
        if error.name == "hypothesis":
            require("hypothesis", extra="test", purpose=f"testing.{name}")
        raise
    value = module if _HOLDERS[name] == f"testing.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
