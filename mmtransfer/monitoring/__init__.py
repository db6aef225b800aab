"""Live transcription of monitoring video: source → voice activity → segments → text → sinks."""

from mmtransfer.monitoring.journal import Journal
from mmtransfer.monitoring.live import LiveSettings, SourceEvent
from mmtransfer.monitoring.pipeline import Monitor, load_monitor, monitor
from mmtransfer.monitoring.transcripts import Alert, MonitorStats, SourceEnd, Transcript
from mmtransfer.segments import Segment, SegmenterSettings

__all__ = [
    "Alert",
    "Journal",
    "LiveSettings",
    "Monitor",
    "MonitorStats",
    "Segment",
    "SegmenterSettings",
    "SourceEnd",
    "SourceEvent",
    "Transcript",
    "load_monitor",
    "monitor",
]
