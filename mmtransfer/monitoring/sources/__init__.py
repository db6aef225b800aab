"""Where a monitor's audio comes from: cameras, recordings, folders."""
