"""The command line: one module a command, and what they share.

stdout carries data, stderr carries talk. Everything heavy (trio, rich, httpx) is imported by the
command that needs it, when it runs, so that ``--help`` and ``submit`` start at once.
"""
