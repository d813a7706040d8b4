"""The verbs of the command line: one module or package each."""
