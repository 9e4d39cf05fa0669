"""Saving, resuming, and starting from somebody else's weights."""
