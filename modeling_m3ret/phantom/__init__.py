"""A synthetic collection: one random anatomy per subject, rendered in five modalities and written as real files."""

SYNTHETIC_SOURCE = "phantom (synthetic)"  # value of the `source` column of every phantom scan
