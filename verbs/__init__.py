"""The tasks of Invoke, a module a subject: words and exit codes.

What they do is in `stack` and `bench`.
"""
