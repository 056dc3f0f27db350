"""codeflow: git histories to training data that shows how code changes.

`import codeflow` costs nothing: the public names load on first use.
"""

__version__ = "0.1.0"
