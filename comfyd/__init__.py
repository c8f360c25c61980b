"""comfyd: a job daemon for ComfyUI."""

from typing import Final

__version__: Final = "0.1.0"
