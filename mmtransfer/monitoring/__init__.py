"""Live transcription of monitoring video: source → voice activity → segments → text → sinks."""

from mmtransfer.monitoring.journal import Journal
from mmtransfer.monitoring.pipeline import (
    Monitor,
    MonitorStats,
    SourceEnd,
    Transcript,
    load_monitor,
    monitor,
)
from mmtransfer.segments import Segment, SegmenterSettings

__all__ = [
    "Journal",
    "Monitor",
    "MonitorStats",
    "Segment",
    "SegmenterSettings",
    "SourceEnd",
    "Transcript",
    "load_monitor",
    "monitor",
]
