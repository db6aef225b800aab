"""What the server of `support.children` imports before it forks: all that a command may need."""

import accelerate  # noqa: F401
import av  # noqa: F401
import ctranslate2  # noqa: F401
import peft  # noqa: F401
import transformers.models.whisper.modeling_whisper  # noqa: F401

import mmtransfer.cli
import mmtransfer.monitoring.session
import mmtransfer.runs.models  # noqa: F401
