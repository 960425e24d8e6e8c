"""What SimpleTuner asks before it imports metal_sdpa_extension."""

from umfa.shim._metal_sdpa_functions import get_version as metal_sdpa_version
from umfa.shim._metal_sdpa_functions import is_metal_available as is_metal_sdpa_available

__all__ = ["is_metal_sdpa_available", "metal_sdpa_version"]
