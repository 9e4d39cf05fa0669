"""Errors a user can act on: each says what was found, what was expected and what to do. The command line prints them without a traceback."""

import difflib


class UserError(Exception):
  """Something outside the program is wrong: a config value, a path, data, a checkpoint."""


class ConfigError(UserError):
  """A config key or value that cannot be used."""


class MissingData(UserError):
  """Data that is not on disk; the message holds the command that prepares it."""


class CheckpointError(UserError):
  """A checkpoint that is absent, broken or does not fit the config."""


def nearest(word: str, known) -> str:
  """'did you mean X?' for the known word closest to `word`, or the list of all when none is close."""
  known = sorted(known)
  close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
  return f'did you mean {close[0]!r}?' if close else f'known: {", ".join(known) or "none"}'
