"""A tiny checkpoint of every architecture that transformers can classify images with: random weights, right shapes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

MODEL_TYPES = sorted(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
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
    "deit": {**VIT, "architectures": ["DeiTForImageClassificationWithTeacher"]},
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
        "architectures": ["LevitForImageClassificationWithTeacher"],
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
        "architectures": ["PerceiverForImageClassificationLearned"],
        "num_latents": 4,
        "d_latents": 16,
        "d_model": 512,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
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
        "architecture": "test_vit",
        "pretrained_cfg": {"input_size": [3, 160, 160], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
    },
    "vit": VIT,
    "vit_msn": VIT,
}


def build(model_type: str) -> PreTrainedModel:
    """A model of one type with three classes and random weights."""
    options = dict(TINY[model_type])
    architectures = options.pop("architectures", None)
    names = dict(enumerate(CLASSES))
    config = AutoConfig.for_model(
        model_type,
        **options,
        num_labels=len(names),
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    config.architectures = architectures
    return AutoModelForImageClassification.from_config(config)


def save_processor(model_type: str, folder: Path) -> None:
    """The image processor of that type, as its checkpoints have it beside them."""
    if model_type == "timm_wrapper":
        return  # it is all in config.json
    if model_type == "imagegpt":
        clusters = np.random.default_rng(0).random((16, 3)).tolist()
        processor = transformers.ImageGPTImageProcessor(clusters=clusters, size={"height": 7, "width": 7})
    elif model_type == "siglip2":
        processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    elif model_type == "textnet":
        processor = transformers.TextNetImageProcessor(size={"shortest_edge": 64}, size_divisor=32)
    elif model_type == "pp_lcnet":
        processor = transformers.PPLCNetImageProcessor(size={"height": 32, "width": 32})
    else:
        size = 64 if model_type.startswith("mobilevit") else 32
        processor = transformers.ViTImageProcessor(size={"height": size, "width": size})
    processor.save_pretrained(folder)


def save_fine_tunes(model_type: str, folder: Path, count: int = 3) -> None:
    """`count` checkpoints that lie around one start, as fine-tunes do."""
    torch.manual_seed(0)
    start = build(model_type).state_dict()
    for index in range(count):
        model = build(model_type)
        model.load_state_dict({name: _moved(tensor, index) for name, tensor in start.items()})
        model.save_pretrained(folder / f"ft-{index}")
        save_processor(model_type, folder / f"ft-{index}")


def _moved(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """Floats a little, so that variances stay positive; counters of batches by the index; tables of indices not."""
    if tensor.is_floating_point():
        return tensor + 0.05 * torch.rand_like(tensor)
    return tensor + index if tensor.ndim == 0 else tensor
