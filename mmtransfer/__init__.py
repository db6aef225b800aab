"""Transfer pretrained speech and text models to your domain."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Names are imported on first use, so that `import mmtransfer` stays fast and loads no torch.
_LAZY = {
    "Config": "mmtransfer.config",
    "load_config": "mmtransfer.config",
    "UserError": "mmtransfer.errors",
    "load_speech_model": "mmtransfer.speech.whisper",
    "load": "mmtransfer.runs.models",
    "predict": "mmtransfer.text.prediction",
    "publish": "mmtransfer.runs.publishing",
    "Recognizer": "mmtransfer.speech.recognition",
    "train": "mmtransfer.runs",
    "evaluate": "mmtransfer.runs",
    "relate": "mmtransfer.runs.relate",
    "lr_range": "mmtransfer.runs.lr_range",
    "compare": "mmtransfer.runs.compare",
    "merge": "mmtransfer.runs.merge",
    "evaluate_recording": "mmtransfer.monitoring.score",
    "load_monitor": "mmtransfer.monitoring",
    "monitor": "mmtransfer.monitoring",
}
__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from mmtransfer.config import Config as Config
    from mmtransfer.config import load_config as load_config
    from mmtransfer.errors import UserError as UserError
    from mmtransfer.monitoring import load_monitor as load_monitor
    from mmtransfer.monitoring import monitor as monitor
    from mmtransfer.monitoring.score import evaluate_recording as evaluate_recording
    from mmtransfer.runs import evaluate as evaluate
    from mmtransfer.runs import train as train
    from mmtransfer.runs.compare import compare as compare
    from mmtransfer.runs.lr_range import lr_range as lr_range
    from mmtransfer.runs.merge import merge as merge
    from mmtransfer.runs.models import load as load
    from mmtransfer.runs.publishing import publish as publish
    from mmtransfer.runs.relate import relate as relate
    from mmtransfer.speech.recognition import Recognizer as Recognizer
    from mmtransfer.speech.whisper import load_speech_model as load_speech_model
    from mmtransfer.text.prediction import predict as predict


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mmtransfer' has no attribute '{name}'")
