"""Live transcription of monitoring video: source → voice activity → segments → text → sinks."""

from mmtransfer.monitoring.events import (
    Alert,
    Occurrence,
    Partial,
    Sound,
    SourceEnd,
    SourceEvent,
    Transcript,
)
from mmtransfer.monitoring.journal.journal import Journal
from mmtransfer.monitoring.monitor import Monitor, load_monitor, monitor
from mmtransfer.monitoring.sources.cameras import Camera
from mmtransfer.monitoring.sources.live import LiveSettings
from mmtransfer.monitoring.stats import MonitorStats
from mmtransfer.speech.segments import Segment, SegmenterSettings

__all__ = [
    "Alert",
    "Camera",
    "Journal",
    "LiveSettings",
    "Monitor",
    "MonitorStats",
    "Occurrence",
    "Partial",
    "Segment",
    "SegmenterSettings",
    "Sound",
    "SourceEnd",
    "SourceEvent",
    "Transcript",
    "load_monitor",
    "monitor",
]
