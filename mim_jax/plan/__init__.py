"""Sizing a run for hardware one does not have: compile the real step, read the program, estimate its time."""
