"""Speech: audio, clips, segments, recognisers, their engines and tasks."""
