"""The commands of ``python -m umfa``, one module each."""
