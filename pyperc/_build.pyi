"""Written by setup.py as _build.py: what the native module was built against."""

TORCH: str
"""The version of torch, as torch.__version__ has it."""
