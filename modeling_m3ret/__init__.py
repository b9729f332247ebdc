"""M3Ret: one vision transformer that embeds any medical scan.

Importing this package registers the model with the Auto classes of transformers, so that checkpoints load without
remote code. `save_pretrained` copies the model code into the checkpoint, so that they also load without the package.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)
from transformers.utils import is_vision_available

from .classification_m3ret import M3RetForImageClassification
from .configuration_m3ret import M3RetConfig
from .image_processing_m3ret import M3RetCollator, M3RetImageProcessor
from .masked_autoencoder_m3ret import M3RetForPreTraining
from .modeling_m3ret import M3RetModel
from .reading_m3ret import M3RetReadError, ReadLimits, Scan, read_scan
from .version import __version__


# with the package: the Auto classes find the classes by model_type
AutoConfig.register("m3ret", M3RetConfig, exist_ok=True)
AutoModel.register(M3RetConfig, M3RetModel, exist_ok=True)
AutoModelForImageClassification.register(M3RetConfig, M3RetForImageClassification, exist_ok=True)
AutoModelForPreTraining.register(M3RetConfig, M3RetForPreTraining, exist_ok=True)
if is_vision_available():  # without Pillow, which only files of images need, transformers has no AutoImageProcessor
    # "torchvision" is asked for where it is installed
    backends: dict[str, type] = {"pil": M3RetImageProcessor, "torchvision": M3RetImageProcessor}
    AutoImageProcessor.register(M3RetConfig, image_processor_classes=backends, exist_ok=True)
# without the package: save_pretrained copies the code into the checkpoint
M3RetConfig.register_for_auto_class()
M3RetModel.register_for_auto_class("AutoModel")
M3RetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
M3RetForPreTraining.register_for_auto_class("AutoModelForPreTraining")
M3RetImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = [
    "M3RetCollator",
    "M3RetConfig",
    "M3RetForImageClassification",
    "M3RetForPreTraining",
    "M3RetImageProcessor",
    "M3RetModel",
    "M3RetReadError",
    "ReadLimits",
    "Scan",
    "__version__",
    "read_scan",
]
