"""Models in Hugging Face's form, in and out: their architectures are specs of ours, their tensors ours renamed.

A model of ours that is none of their architectures goes out with its own code.
"""

from mosaic_dist.convert.hugging_face.architectures import (
    ARCHITECTURES,
    config_from_spec,
    spec_from_config,
    weights_to_hugging_face,
    weights_to_ours,
)
from mosaic_dist.convert.hugging_face.folder import SafetensorsFolder, export_folder, how_to_load, import_folder

__all__ = [
    "ARCHITECTURES",
    "SafetensorsFolder",
    "config_from_spec",
    "export_folder",
    "how_to_load",
    "import_folder",
    "spec_from_config",
    "weights_to_hugging_face",
    "weights_to_ours",
]
