"""What the server of `support.children` imports before it forks: all that a command may need."""

import os

# As the command line has them when it imports these libraries.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import accelerate  # noqa: F401
import av  # noqa: F401
import ctranslate2  # noqa: F401
import peft  # noqa: F401
import transformers.models.whisper.modeling_whisper  # noqa: F401

import mmtransfer.cli
import mmtransfer.models
import mmtransfer.monitoring
import mmtransfer.runs  # noqa: F401
