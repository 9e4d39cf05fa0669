"""Plain vision transformers of other libraries: names, settings and position tables, both ways."""
