"""Image and video models, and those that pair images with text."""

from __future__ import annotations

from typing import Any

from transformers import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2SwiGLUFFN

from tests.architectures.row import (
    IMAGE,
    SMALL,
    UNSET,
    Row,
    image,
    image_and_text,
    pretrained,
    video,
)

_PATCHES: dict[str, Any] = {"image_size": IMAGE, "patch_size": 8, "num_labels": 3}
_VISION: dict[str, Any] = {**SMALL, **_PATCHES}
_TWO_TOWERS = ("text_model.encoder.layers.{}.mlp.fc2", "vision_model.encoder.layers.{}.mlp.fc2")


def _vit_like(name: str, model: str, down: str, **settings: Any) -> Row:
    return pretrained(name, model, down, inputs=image, **{**_PATCHES, **settings})


def _staged(pattern: str, depths: tuple[int, ...]) -> tuple[str, ...]:
    """A down name for every block of every stage."""
    return tuple(pattern.format(stage, block) for stage, depth in enumerate(depths) for block in range(depth))


def _dinov2_swiglu_down() -> str:
    """Releases of transformers after 5.17 renamed `weights_out`."""
    renamed = hasattr(Dinov2SwiGLUFFN(Dinov2Config(hidden_size=8)), "down_proj")
    return f"dinov2.encoder.layer.{{}}.mlp.{'down_proj' if renamed else 'weights_out'}"


ROWS: tuple[Row, ...] = (
    _vit_like("vit", "ViTForImageClassification", "vit.layers.{}.mlp.fc2", onnx=True, in_default_run=True),
    _vit_like("deit", "DeiTForImageClassification", "deit.layers.{}.mlp.fc2"),
    _vit_like("beit", "BeitForImageClassification", "beit.layers.{}.mlp.fc2"),
    _vit_like(
        "data2vec_vision", "Data2VecVisionForImageClassification", "data2vec_vision.encoder.layer.{}.output.dense"
    ),
    _vit_like("vit_msn", "ViTMSNForImageClassification", "vit.layers.{}.mlp.fc2"),
    _vit_like("ijepa", "IJepaForImageClassification", "ijepa.layers.{}.mlp.fc2"),
    _vit_like(
        "yolos", "YolosModel", "encoder.layer.{}.output.dense", image_size=[IMAGE, IMAGE], num_detection_tokens=3
    ),
    _vit_like("dinov2", "Dinov2ForImageClassification", "dinov2.encoder.layer.{}.mlp.fc2", onnx=True),
    _vit_like("dinov2_swiglu", "Dinov2ForImageClassification", _dinov2_swiglu_down(), use_swiglu_ffn=True),
    _vit_like(
        "dinov2_registers",
        "Dinov2WithRegistersForImageClassification",
        "dinov2_with_registers.encoder.layer.{}.mlp.fc2",
    ),
    _vit_like("dinov3", "DINOv3ViTModel", "model.layer.{}.mlp.down_proj"),
    _vit_like("dinov3_gated", "DINOv3ViTModel", "model.layer.{}.mlp.down_proj", use_gated_mlp=True, hidden_act="silu"),
    pretrained(
        "siglip",
        "SiglipModel",
        *_TWO_TOWERS,
        "vision_model.head.mlp.fc2",
        inputs=image_and_text,
        text_config=SMALL,
        vision_config=_VISION,
    ),
    pretrained(
        "siglip_vision", "SiglipVisionModel", "encoder.layers.{}.mlp.fc2", "head.mlp.fc2", inputs=image, **_PATCHES
    ),
    pretrained(
        "clip",
        "CLIPModel",
        *_TWO_TOWERS,
        inputs=image_and_text,
        text_config=SMALL,
        vision_config=_VISION,
        projection_dim=16,
        in_default_run=True,
    ),
    pretrained("altclip_vision", "AltCLIPVisionModel", "encoder.layers.{}.mlp.fc2", inputs=image, **_PATCHES),
    pretrained(
        "owlvit",
        "OwlViTModel",
        *_TWO_TOWERS,
        inputs=image_and_text,
        text_config=SMALL,
        vision_config=_VISION,
        projection_dim=16,
    ),
    pretrained("blip_vision", "BlipVisionModel", "encoder.layers.{}.mlp.fc2", inputs=image, **_PATCHES),
    pretrained(
        "vilt", "ViltModel", "encoder.layer.{}.output.dense", inputs=image_and_text, exportable=False, **_PATCHES
    ),
    pretrained(
        "videomae",
        "VideoMAEForVideoClassification",
        "videomae.encoder.layer.{}.output.dense",
        inputs=video,
        num_frames=4,
        **_PATCHES,
    ),
    pretrained(
        "swin",
        "SwinForImageClassification",
        *_staged("swin.encoder.layers.{}.blocks.{}.mlp.fc2", (1, 2)),
        inputs=image,
        image_size=IMAGE,
        patch_size=2,
        embed_dim=16,
        depths=[1, 2],
        num_heads=[2, 4],
        window_size=4,
        hidden_size=UNSET,
        num_attention_heads=UNSET,
    ),
    pretrained(
        "swinv2",
        "Swinv2ForImageClassification",
        *_staged("swinv2.encoder.layers.{}.blocks.{}.output.dense", (1, 2)),
        inputs=image,
        image_size=IMAGE,
        patch_size=2,
        embed_dim=16,
        depths=[1, 2],
        num_heads=[2, 4],
        window_size=4,
        hidden_size=UNSET,
        num_attention_heads=UNSET,
    ),
    pretrained(
        "convnext",
        "ConvNextForImageClassification",
        *_staged("convnext.encoder.stages.{}.layers.{}.pwconv2", (1, 2)),
        inputs=image,
        depths=[1, 2],
        hidden_sizes=[16, 32],
        num_stages=2,
        hidden_size=UNSET,
    ),
    pretrained(
        "convnextv2",
        "ConvNextV2ForImageClassification",
        inputs=image,
        depths=[1, 2],
        hidden_sizes=[16, 32],
        num_stages=2,
        hidden_size=UNSET,
    ),
    pretrained(
        "segformer",
        "SegformerForImageClassification",
        inputs=image,
        depths=[1, 1],
        hidden_sizes=[16, 32],
        num_encoder_blocks=2,
        num_attention_heads=[2, 4],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[4, 4],
    ),
    pretrained(
        "focalnet",
        "FocalNetForImageClassification",
        *_staged("focalnet.encoder.stages.{}.layers.{}.mlp.fc2", (1, 2)),
        inputs=image,
        image_size=IMAGE,
        embed_dim=16,
        depths=[1, 2],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        hidden_sizes=[16, 32],
        hidden_size=UNSET,
    ),
    pretrained(
        "poolformer",
        "PoolFormerForImageClassification",
        *_staged("poolformer.encoder.block.{}.{}.output.conv2", (1, 2)),
        inputs=image,
        depths=[1, 2],
        hidden_sizes=[16, 32],
        num_encoder_blocks=2,
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        hidden_size=UNSET,
    ),
    pretrained(
        "pvt",
        "PvtForImageClassification",
        *_staged("pvt.encoder.block.{}.{}.mlp.dense2", (1, 2)),
        inputs=image,
        image_size=IMAGE,
        depths=[1, 2],
        hidden_sizes=[16, 32],
        num_encoder_blocks=2,
        patch_sizes=[4, 2],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        sequence_reduction_ratios=[2, 1],
        mlp_ratios=[4, 4],
        hidden_size=UNSET,
    ),
)
