"""Measures load, answers, GPU memory and our own commands; judges figures, prints nothing."""
