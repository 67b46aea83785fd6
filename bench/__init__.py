"""Measures: how long our own commands take. Results go to no verdict here."""
