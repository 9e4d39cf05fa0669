"""What a run tells: metric files, panels, the progress line."""
