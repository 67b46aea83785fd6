"""What operates and measures the deployment: frozen values out, `StackError` on failure.

Not here: printing, verdicts, and anything that imports Invoke, Nox or pytest.
"""
