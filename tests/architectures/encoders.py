"""Encoder-only language models: BERT and relatives."""

from __future__ import annotations

from typing import Any

import torch

from tests.architectures.row import HEADS, HIDDEN, LAYERS, UNSET, WIDTH, Row, pretrained, unmasked_text


def _bert_like(name: str, model: str, prefix: str, **settings: Any) -> Row:
    """Models whose layers are BERT's: an `intermediate` and an `output` beside an `attention` with an `output`."""
    return pretrained(name, model, f"{prefix}.{{}}.output.dense", **settings)


ROWS: tuple[Row, ...] = (
    _bert_like("bert", "BertForSequenceClassification", "bert.encoder.layer", onnx=True, in_default_run=True),
    _bert_like("roberta", "RobertaForMaskedLM", "roberta.encoder.layer", onnx=True),
    _bert_like("roberta_prelayernorm", "RobertaPreLayerNormForMaskedLM", "roberta_prelayernorm.encoder.layer"),
    _bert_like("xlm_roberta", "XLMRobertaForMaskedLM", "roberta.encoder.layer"),
    _bert_like("xlm_roberta_xl", "XLMRobertaXLForMaskedLM", "roberta.encoder.layer"),
    _bert_like("camembert", "CamembertForMaskedLM", "roberta.encoder.layer"),
    _bert_like("ernie", "ErnieForMaskedLM", "ernie.encoder.layer"),
    _bert_like("electra", "ElectraForMaskedLM", "electra.encoder.layer", embedding_size=WIDTH),
    _bert_like("megatron_bert", "MegatronBertForMaskedLM", "bert.encoder.layer"),
    _bert_like("bert_generation", "BertGenerationEncoder", "encoder.layer"),
    _bert_like(
        "rembert",
        "RemBertForMaskedLM",
        "rembert.encoder.layer",
        input_embedding_size=WIDTH,
        output_embedding_size=WIDTH,
    ),
    _bert_like("roformer", "RoFormerForMaskedLM", "roformer.encoder.layer", embedding_size=WIDTH),
    _bert_like("convbert", "ConvBertForMaskedLM", "convbert.encoder.layer", embedding_size=WIDTH, conv_kernel_size=3),
    _bert_like("ibert", "IBertForMaskedLM", "ibert.encoder.layer"),
    _bert_like(
        "nystromformer",
        "NystromformerForMaskedLM",
        "nystromformer.encoder.layer",
        num_landmarks=10,
        segment_means_seq_len=10,
    ),
    _bert_like("data2vec_text", "Data2VecTextForMaskedLM", "data2vec_text.encoder.layer"),
    _bert_like("deberta", "DebertaForMaskedLM", "deberta.encoder.layer", type_vocab_size=0),
    _bert_like("deberta_v2", "DebertaV2ForMaskedLM", "deberta.encoder.layer"),
    _bert_like("mpnet", "MPNetForMaskedLM", "mpnet.encoder.layer"),
    _bert_like("esm", "EsmForMaskedLM", "esm.encoder.layer"),
    _bert_like("fnet", "FNetForMaskedLM", "fnet.encoder.layer", inputs=unmasked_text),
    _bert_like("layoutlm", "LayoutLMForMaskedLM", "layoutlm.encoder.layer"),
    _bert_like("markuplm", "MarkupLMModel", "encoder.layer"),
    _bert_like("splinter", "SplinterModel", "encoder.layer"),
    _bert_like("luke", "LukeModel", "encoder.layer", entity_vocab_size=8),
    _bert_like("big_bird", "BigBirdForMaskedLM", "bert.encoder.layer", attention_type="original_full"),
    _bert_like("longformer", "LongformerForMaskedLM", "longformer.encoder.layer", attention_window=4, exportable=False),
    pretrained(
        "canine",
        "CanineModel",
        "initial_char_encoder.layer.0.output.dense",
        "encoder.layer.{}.output.dense",
        "final_char_encoder.layer.0.output.dense",
        dtype=torch.float32,  # in float64 its mask, float32 times the lowest float64, is NaN everywhere
    ),
    pretrained(
        "distilbert", "DistilBertForMaskedLM", "distilbert.transformer.layer.{}.ffn.lin2", hidden_dim=HIDDEN, onnx=True
    ),
    pretrained(
        "albert",
        "AlbertForMaskedLM",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
        embedding_size=16,
    ),
    pretrained("modernbert", "ModernBertForMaskedLM", "model.layers.{}.mlp.Wo", onnx=True, in_default_run=True),
    pretrained("eurobert", "EuroBertForMaskedLM", "model.layers.{}.mlp.down_proj"),
    pretrained("nomic_bert", "NomicBertModel", "layers.{}.mlp.down_proj"),
    pretrained("xlm", "XLMWithLMHeadModel", "transformer.ffns.{}.lin2", emb_dim=WIDTH, n_heads=HEADS, n_layers=LAYERS),
    pretrained(
        "flaubert", "FlaubertWithLMHeadModel", "transformer.ffns.{}.lin2", emb_dim=WIDTH, n_heads=HEADS, n_layers=LAYERS
    ),
    pretrained(
        "funnel",
        "FunnelForMaskedLM",
        "funnel.encoder.blocks.0.{}.ffn.linear_2",
        "funnel.encoder.blocks.1.{}.ffn.linear_2",
        "funnel.decoder.layers.{}.ffn.linear_2",
        block_sizes=[LAYERS, LAYERS],
        num_hidden_layers=UNSET,
        num_decoder_layers=LAYERS,
        d_head=8,
        d_inner=HIDDEN,
    ),
    pretrained("squeezebert", "SqueezeBertForMaskedLM", embedding_size=WIDTH),
    pretrained("mobilebert", "MobileBertForMaskedLM", embedding_size=16),
    pretrained("t5_encoder", "T5EncoderModel", "encoder.block.{}.layer.1.DenseReluDense.wo", d_ff=HIDDEN, d_kv=8),
)
