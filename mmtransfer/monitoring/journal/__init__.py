"""What a monitor keeps on disk: its journal, and audio that waits."""
