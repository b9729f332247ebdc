"""The evaluation report: its numbers (`numbers`), its figures (`plots`, `style`), and its files (`report`)."""
