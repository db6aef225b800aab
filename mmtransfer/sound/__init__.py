"""Classes of sounds in audio."""
