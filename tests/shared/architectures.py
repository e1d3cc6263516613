"""Tiny checkpoints of every class of transformers that classifies images: random weights, right shapes."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

CLASSES = ("cat", "dog", "fish")

# What can't be made a soup of, and why.
EXCEPTIONS = {
    "dinat": "needs the natten library, which has no wheel for current versions of torch",
    "shieldgemma2": "answers a prompt about a policy, yes or no, and does not classify images into classes of its own",
}

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
TOWERS = {"vision_config": VIT, "text_config": TEXT}
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16]}
FOUR_STAGES = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "mlp_ratios": [2] * 4}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}

TINY: dict[str, dict[str, Any]] = {
    "beit": VIT,
    "bit": {"embedding_size": 8, "num_groups": 2, **STAGES},
    "clip": {**TOWERS, "projection_dim": 16},
    "convnext": {"num_stages": 2, **STAGES},
    "convnextv2": {"num_stages": 2, **STAGES},
    "cvt": {"embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3]},
    "data2vec-vision": {**VIT, "out_indices": [0, 1, 1, 1]},
    "deit": VIT,
    "dinov2": VIT,
    "dinov2_with_registers": VIT,
    "donut-swin": SWIN,
    "efficientnet": {
        "image_size": 32,
        "width_coefficient": 0.25,
        "depth_coefficient": 0.25,
        "in_channels": [32, 16],
        "out_channels": [16, 24],
        "kernel_sizes": [3, 3],
        "strides": [1, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 6],
        "hidden_dim": 320,
    },
    "focalnet": {
        "image_size": 32,
        "embed_dim": 8,
        "hidden_sizes": [16, 16],
        "depths": [1, 1],
        "focal_levels": [1, 1],
        "focal_windows": [3, 3],
    },
    "hgnet_v2": {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 16, 16],
        "stage_mid_channels": [8] * 4,
        "stage_out_channels": [16, 16, 16, 32],
        "stage_num_blocks": [1] * 4,
        "stage_numb_of_layers": [2] * 4,
        "hidden_sizes": [16, 16, 16, 32],
        "depths": [1] * 4,
        "embedding_size": 8,
    },
    "hiera": {
        "embed_dim": 8,
        "image_size": [32, 32],
        "depths": [1, 1],
        "num_heads": [1, 2],
        "num_query_pool": 1,
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, False],
    },
    "ijepa": VIT,
    "imagegpt": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 17},
    "levit": {
        "image_size": 32,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [1, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "metaclip_2": {**TOWERS, "projection_dim": 16},
    "mobilenet_v1": {"image_size": 32, "depth_multiplier": 0.25},
    "mobilenet_v2": {"image_size": 32, "depth_multiplier": 0.25},
    "mobilevit": {
        "image_size": 64,
        "hidden_sizes": [16, 20, 24],
        "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 32],
        "num_attention_heads": 2,
    },
    "mobilevitv2": {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]},
    "perceiver": {
        "num_latents": 4,
        "d_latents": 16,
        "qk_channels": 16,
        "v_channels": 16,
        "num_blocks": 1,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
        "image_size": 32,
    },
    "poolformer": {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16]},
    "pp_lcnet": {"scale": 0.25, "class_expand": 32},
    "pvt": {"image_size": 32, **FOUR_STAGES},
    "pvt_v2": {"image_size": [32, 32], **FOUR_STAGES},
    "regnet": {"embedding_size": 8, "groups_width": 8, **STAGES},
    "resnet": {"embedding_size": 8, **STAGES},
    "segformer": {"decoder_hidden_size": 8, **FOUR_STAGES},
    "siglip": TOWERS,
    "siglip2": {
        "vision_config": {key: value for key, value in VIT.items() if key != "image_size"} | {"num_patches": 16},
        "text_config": TEXT,
    },
    "swiftformer": {"image_size": 32, "depths": [1] * 4, "embed_dims": [8, 8, 16, 16], "mlp_ratio": 2},
    "swin": SWIN,
    "swinv2": SWIN,
    "textnet": {
        "conv_layer_kernel_sizes": [[[3, 3]]] * 4,
        "conv_layer_strides": [[2]] * 4,
        "hidden_sizes": [8, 8, 8, 8, 16],
        "stem_out_channels": 8,
        "depths": [1] * 4,
        "image_size": [64, 64],
    },
    "timm_wrapper": {
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
    },
    "vit": VIT,
    "vit_msn": VIT,
}


# What one class needs besides, or one of timm's nets.
TINY_TOO: dict[str, dict[str, Any]] = {
    # the channels that the class makes of a pixel and its place
    "PerceiverForImageClassificationLearned": {"d_model": 512},
    "PerceiverForImageClassificationFourier": {"d_model": 261},
    "PerceiverForImageClassificationConvProcessing": {"d_model": 322},
    "test_vit": {"model_args": {"img_size": 64, "depth": 2}},
}

# One of timm's nets with LayerNorm and one with BatchNorm; timm has many hundreds, all in one class of transformers.
TIMM_NETS = ("test_vit", "test_efficientnet")


@dataclass(frozen=True)
class Architecture:
    """A class of transformers that classifies images; if it wraps timm's nets, one of these."""

    model_type: str
    class_name: str
    net: str | None = None

    def __str__(self) -> str:
        return f"{self.class_name} ({self.net})" if self.net else self.class_name

    @property
    def options(self) -> dict[str, Any]:
        """What makes its configuration tiny.

        Raises:
            LookupError: for a type of models that nobody has tried yet.
        """
        if self.model_type not in TINY:
            raise LookupError(f"{self} is new: give it a tiny configuration, or a reason why it can't work.")
        net = {"architecture": self.net, **TINY_TOO.get(self.net, {})} if self.net else {}
        return TINY[self.model_type] | TINY_TOO.get(self.class_name, {}) | net


def _installed() -> Iterator[Architecture]:
    for model_type, names in sorted(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items()):
        for class_name in (names,) if isinstance(names, str) else names:
            for net in TIMM_NETS if model_type == "timm_wrapper" else (None,):
                yield Architecture(model_type, class_name, net)


INSTALLED = tuple(_installed())


def pictures(count: int = 6) -> list[Image.Image]:
    """Noise about a colour of its own each: noise alone would be grey once it is resized, and all pictures alike."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 192, (count, 1, 1, 3))
    noise = generator.integers(0, 64, (count, 40, 50, 3))
    return [Image.fromarray(image) for image in (colours + noise).astype(np.uint8)]


def build(architecture: Architecture, classes: Sequence[str] = CLASSES) -> PreTrainedModel:
    """A model of one architecture with random weights, in evaluation mode."""
    names = dict(enumerate(classes))
    config = AutoConfig.for_model(
        architecture.model_type,
        **architecture.options,
        num_labels=len(names),
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    config.architectures = [architecture.class_name]
    model = AutoModelForImageClassification.from_config(config).eval()
    assert type(model).__name__ == architecture.class_name
    return model


def build_processor(architecture: Architecture) -> BaseImageProcessor:
    """An image processor of that type, of images as small as the model's."""
    match architecture.model_type:
        case "timm_wrapper":
            return transformers.TimmWrapperImageProcessor(architecture.options["pretrained_cfg"], architecture.net)
        case "imagegpt":
            clusters = np.random.default_rng(0).uniform(-1, 1, (16, 3)).tolist()
            return transformers.ImageGPTImageProcessor(clusters=clusters, size={"height": 7, "width": 7})
        case "siglip2":
            return transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
        case "textnet":
            return transformers.TextNetImageProcessor(size={"shortest_edge": 64}, size_divisor=32)
        case "pp_lcnet":
            return transformers.PPLCNetImageProcessor(resize_short=32, crop_size={"height": 32, "width": 32})
        case model_type:
            size = 64 if model_type.startswith("mobilevit") else 32
            return transformers.ViTImageProcessor(size={"height": size, "width": size})


def save_fine_tunes(
    architecture: Architecture, folder: Path, count: int = 3, *, classes: Sequence[str] = CLASSES
) -> None:
    """`count` checkpoints that lie around one start, as fine-tunes do, each with the BatchNorm statistics of its own.

    With a new model's weights and statistics the signal dies away layer by layer: all images get the same logits.
    """
    torch.manual_seed(0)
    start = build(architecture, classes)
    for parameter in start.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    processor = build_processor(architecture)
    inputs = processor(images=pictures(), return_tensors="pt")
    for index in range(count):
        model = copy.deepcopy(start)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
            for module in filter(lambda module: isinstance(module, BatchNorm), model.modules()):
                module.momentum = None  # the statistics of all batches count alike
                module.train()
            for _ in range(index + 1):  # so that the counters of batches differ
                model(**inputs)
        model.eval().save_pretrained(folder / f"ft-{index}")
        processor.save_pretrained(folder / f"ft-{index}")
