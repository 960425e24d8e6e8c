"""Attention by umfa, with the interface that SimpleTuner knows. Importing it puts umfa under
PyTorch's attention.

For processes that find this folder in ``PYTHONPATH``; see `umfa.shim.metal_sdpa_extension`.
"""

from umfa.shim import _metal_sdpa
from umfa.shim._metal_sdpa_functions import *  # noqa: F403 (its __all__)

_metal_sdpa.begin()
