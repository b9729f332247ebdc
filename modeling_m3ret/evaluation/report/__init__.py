"""Figures of an evaluation report: what they show (`numbers`), how they are drawn (`plots`, `style`), and the files."""
