"""What the server of `support.children` imports before it forks: all that a command may need."""

import gc

import accelerate  # noqa: F401
import av  # noqa: F401
import ctranslate2  # noqa: F401
import peft  # noqa: F401
import transformers.models.whisper.modeling_whisper  # noqa: F401

import mmtransfer.cli
import mmtransfer.monitoring.session
import mmtransfer.runs.models  # noqa: F401

gc.collect()
gc.freeze()  # as in the workers, and so that its memory stays shared
