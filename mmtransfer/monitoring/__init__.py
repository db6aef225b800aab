"""Live transcription of monitoring video: source → voice activity → segments → text → sinks."""

from mmtransfer.monitoring.events import (
    Alert,
    ClassifiedSound,
    Item,
    Occurrence,
    Partial,
    Shown,
    Sound,
    SourceEnd,
    SourceEvent,
    Transcript,
)
from mmtransfer.monitoring.journal.journal import Journal
from mmtransfer.monitoring.loading import load_monitor, monitor
from mmtransfer.monitoring.monitor import Monitor
from mmtransfer.monitoring.options import MonitorOptions, RecognitionOptions, load_options
from mmtransfer.monitoring.outputs.sinks import Sink
from mmtransfer.monitoring.session import Session, run
from mmtransfer.monitoring.sources.cameras import Camera, Retention
from mmtransfer.monitoring.sources.live import LiveSettings
from mmtransfer.monitoring.stats import MonitorStats
from mmtransfer.speech.segments import Segment, SegmenterSettings

__all__ = [
    "Alert",
    "Camera",
    "ClassifiedSound",
    "Item",
    "Journal",
    "LiveSettings",
    "Monitor",
    "MonitorOptions",
    "MonitorStats",
    "Occurrence",
    "Partial",
    "RecognitionOptions",
    "Retention",
    "Segment",
    "SegmenterSettings",
    "Session",
    "Shown",
    "Sink",
    "Sound",
    "SourceEnd",
    "SourceEvent",
    "Transcript",
    "load_monitor",
    "load_options",
    "monitor",
    "run",
]
