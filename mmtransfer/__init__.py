"""Transfer pretrained speech and text models to your domain."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are imported on first use, so that `import mmtransfer` stays fast and loads no torch.
_LAZY = {
    "Config": "mmtransfer.config",
    "load_config": "mmtransfer.config",
    "UserError": "mmtransfer.errors",
    "backbones": "mmtransfer.bundled",
    "train": "mmtransfer.training",
    "evaluate": "mmtransfer.evaluation",
    "Recognizer": "mmtransfer.recognition",
    "monitor": "mmtransfer.monitoring",
}
__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from mmtransfer.config import Config, load_config
    from mmtransfer.errors import UserError


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = import_module(_LAZY[name])
        return module if module.__name__.endswith(f".{name}") else getattr(module, name)
    raise AttributeError(f"module 'mmtransfer' has no attribute '{name}'")
