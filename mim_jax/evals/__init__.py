"""Evaluators: each takes an encoder and its own data and returns named figures; none knows a method."""
