"""Live transcription of monitoring video: source → voice activity → segments → text → sinks."""

from mmtransfer.monitoring.pipeline import (
    Monitor,
    MonitorStats,
    Transcript,
    load_monitor,
    monitor,
)
from mmtransfer.segments import Segment, SegmenterSettings

__all__ = [
    "Monitor",
    "MonitorStats",
    "Segment",
    "SegmenterSettings",
    "Transcript",
    "load_monitor",
    "monitor",
]
