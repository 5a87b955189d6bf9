"""Networks: the paper's backbones, torchvision's and timm's; weights from files and to them."""

from r2d2fast.models.backbones import BACKBONES, make_model
from r2d2fast.models.batch_norm import frozen_statistics, with_bn_groups
from r2d2fast.models.export import export_onnx, export_safetensors
from r2d2fast.models.feature_extractor import FeatureExtractor, make_feature_extractor
from r2d2fast.models.library_weights import DEFAULT, OwnImages, own_images
from r2d2fast.models.pretrained import PretrainedError, load_pretrained
from r2d2fast.models.small import small_convnet

__all__ = [
    "BACKBONES",
    "DEFAULT",
    "FeatureExtractor",
    "OwnImages",
    "PretrainedError",
    "export_onnx",
    "export_safetensors",
    "frozen_statistics",
    "load_pretrained",
    "make_feature_extractor",
    "make_model",
    "own_images",
    "small_convnet",
    "with_bn_groups",
]
