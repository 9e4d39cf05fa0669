"""The verbs of `mim-jax`, one module each: `HELP` (first line, then an example), `add(parser)` and `run(args) -> exit code`."""
