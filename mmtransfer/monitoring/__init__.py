"""Live transcription of monitoring video: source → voice activity → segments → text → sinks."""

from mmtransfer.monitoring.cameras import Camera
from mmtransfer.monitoring.journal import Journal
from mmtransfer.monitoring.live import LiveSettings, SourceEvent
from mmtransfer.monitoring.pipeline import Monitor, load_monitor, monitor
from mmtransfer.monitoring.transcripts import (
    Alert,
    MonitorStats,
    Partial,
    Sound,
    SourceEnd,
    Transcript,
)
from mmtransfer.segments import Segment, SegmenterSettings

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
