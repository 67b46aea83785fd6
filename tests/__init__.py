"""Proofs and verdicts. `unit` needs nothing; `checks` needs real servers."""
