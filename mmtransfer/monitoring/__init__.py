"""Live transcription of monitoring video: source → voice activity → segments → text → sinks."""

from mmtransfer.monitoring.events import (
    Alert,
    MonitorStats,
    Partial,
    Sound,
    SourceEnd,
    Transcript,
)
from mmtransfer.monitoring.journal.journal import Journal
from mmtransfer.monitoring.monitor import Monitor, load_monitor, monitor
from mmtransfer.monitoring.sources.cameras import Camera
from mmtransfer.monitoring.sources.live import LiveSettings, SourceEvent
from mmtransfer.speech.segments import Segment, SegmenterSettings

__all__ = [
    "Alert",
    "Camera",
    "Journal",
    "LiveSettings",
    "Monitor",
    "MonitorStats",
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
