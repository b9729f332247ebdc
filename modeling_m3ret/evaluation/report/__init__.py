"""The evaluation report: its numbers (`numbers`), its figures (`plots`), and its files (`report`)."""
