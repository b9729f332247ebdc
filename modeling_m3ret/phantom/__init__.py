"""A synthetic collection: one random anatomy per subject, rendered in five modalities and written to real formats."""

SYNTHETIC_SOURCE = "phantom (synthetic)"  # value of the column `source` of every phantom scan
