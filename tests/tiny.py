"""Small models of the architectures that the installed transformers has, by rules for the names in configurations."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto

VOCABULARY, WIDTH, LAYERS, POSITIONS, SIDE, PATCH = 96, 32, 2, 64, 16, 8

_RULES: tuple[tuple[str, Any], ...] = (
    (r"^(pad_token_id|padding_idx|pad_index)$", 0),
    (r"^(bos_token_id|bos_index|cls_token_id)$", 1),
    (r"^(eos_token_id|eos_index|sep_token_id|decoder_start_token_id|forced_eos_token_id)$", 2),
    (r"^(mask_token_id|mask_index|unk_token_id|unk_index|image_token_id|image_token_index)$", 3),
    (r"^(vocab_size|n_vocab|decoder_vocab_size|vocab_size_per_layer_input)$", VOCABULARY),
    (r"^(num_key_value_heads|n_kv_heads|num_kv_heads|multi_query_groups)$", 2),
    (r"(num_attention_heads|^n_heads?$|^num_heads$|^attention_heads$|_attention_heads$|^heads$)", 4),
    (r"(^head_dim$|^attention_head_dim$|^d_kv$|^kv_channels$|head_size|global_head_dim)$", 8),
    (r"^(qk_nope_head_dim|v_head_dim|qk_rope_head_dim|index_head_dim)$", 8),
    (r"^(q_lora_rank|kv_lora_rank|lora_rank|o_lora_rank)$", 16),
    (r"^(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth|num_block)$", LAYERS),
    (r"^(num_encoder_layers|num_decoder_layers|encoder_num_layers|decoder_num_layers|n_layer)$", LAYERS),
    (r"^(num_nextn_predict_layers|num_mtp_modules|first_k_dense_replace|num_dense_layers)$", 1),
    (r"^(hidden_size|d_model|n_embd|dim|emb_dim|embed_dim|width|model_dim|word_embed_proj_dim|encoder_dim)$", WIDTH),
    (r"^(embedding_size|hidden_dim_size|input_dim|output_dim|projection_dim|encoder_hidden_size)$", WIDTH),
    (r"^(decoder_hidden_size|d_embed|lru_width|cross_attention_hidden_size|hidden_size_per_layer_input)$", WIDTH),
    (
        r"(intermediate_size|ffn_dim|^d_ff$|^n_inner$|^hidden_dim$|^dff$|^d_inner$|feed_forward.*size|ffn_hidden_size)$",
        64,
    ),
    (
        r"^(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|max_source_positions|seq_length)$",
        POSITIONS,
    ),
    (
        r"^(max_target_positions|context_length|n_ctx|original_max_position_embeddings|max_2d_position_embeddings)$",
        POSITIONS,
    ),
    (r"^(num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_selected_experts|moe_top_k|moe_num_active_experts)$", 2),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts)$", 4),
    (r"^(n_shared_experts|num_shared_experts|n_group|topk_group|moe_num_shared_experts)$", 1),
    (r"^(sliding_window|local_attention|attention_window_size|sliding_window_size|attention_chunk_size)$", 8),
    (r"^(type_vocab_size)$", 2),
    (r"^(image_size|img_size)$", SIDE),
    (r"^(patch_size)$", PATCH),
    (r"^(num_frames)$", 2),
    (r"^(tubelet_size)$", 1),
    (r"^(state_size|d_state|mamba_d_state|ssm_state_size|state_dim)$", 4),
    (r"^(mamba_n_heads|mamba_num_heads)$", 8),
    (r"^(mamba_d_head|mamba_head_dim)$", 8),
    (r"^(mamba_n_groups|n_groups|mamba_num_groups)$", 1),
    (r"^(linear_num_key_heads|linear_num_value_heads)$", 2),
    (r"^(linear_key_head_dim|linear_value_head_dim)$", 8),
    (r"^(use_mamba_kernels|use_cuda_kernels)$", False),
    (r"^(num_mel_bins)$", 16),
    (r"^(num_conv_pos_embeddings)$", 16),
    (r"^(num_conv_pos_embedding_groups)$", 4),
    (r"^(conv_dim)$", [32, 32, 32]),
    (r"^(conv_stride)$", [5, 4, 4]),
    (r"^(conv_kernel)$", [10, 8, 4]),
    (r"^(embedding_dim|axial_pos_embds_dim_)$", WIDTH),
    (r"^(position_buckets)$", 8),
)
"""The first rule whose pattern fits the name of a number decides its value."""

_EVEN_IF_NONE = ("_token_id", "key_value_heads", "head_dim", "vocab_size")

_SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 16, "patch_size": 2}

SPECIAL: Mapping[str, dict[str, Any]] = {
    "longformer": {"attention_window": 8},
    "led": {"attention_window": 8, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "big_bird": {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
    "phi3": {
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 12,
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [1.5, 2.0, 3.0, 4.0],
            "rope_theta": 1e4,
            "original_max_position_embeddings": 12,
        },
    },
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "xlm": {"emb_dim": 32, "n_langs": 1},
    "swin": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 2,
        "image_size": 16,
        "patch_size": 2,
    },
    "swinv2": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 2,
        "image_size": 16,
        "patch_size": 2,
    },
    "funnel": {"block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},
    "perceiver": {"d_model": 32, "d_latents": 32, "num_latents": 8, "num_blocks": 1, "num_self_attends_per_block": 2},
    "mpt": {"d_model": 32, "max_seq_len": 64},
    "bloom": {"n_layer": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "head_dim": 8},
    "reformer": {
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "hash_seed": 0,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "is_decoder": False,
        "attention_head_size": 8,
    },
}
"""What the rules do not get right, by type of model."""

MAPPINGS: Mapping[str, tuple[str, ...]] = {
    "encoder": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES"),
    "decoder": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "encoder-decoder": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
    "vision": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES"),
    "audio": ("MODEL_FOR_CTC_MAPPING_NAMES", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
}
"""Which tables of transformers have the models of a kind."""


def architectures() -> list[tuple[str, str, str]]:
    """Every (kind, type of model, class name) of the tables, sorted; a type once for each kind."""
    found: dict[tuple[str, str], str] = {}
    for kind, tables in MAPPINGS.items():
        for table in tables:
            for model_type, classes in getattr(auto, table).items():
                first = classes if isinstance(classes, str) else classes[0]
                found.setdefault((kind, model_type), first)
    return sorted((kind, model_type, name) for (kind, model_type), name in found.items())


def tiny_config(model_type: str) -> Any:
    """A configuration of a small model of this type; raises whatever its class raises."""
    kind: Any = transformers.CONFIG_MAPPING[model_type]
    settings = _reduced(kind().to_dict()) | SPECIAL.get(model_type, {})
    return kind(**settings)


def _reduced(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Small values for the names that a rule is for, also inside nested configurations."""
    settings: dict[str, Any] = {}
    layers = next((LAYERS for name in defaults if re.search(r"layers?$|^depth$", name)), LAYERS)
    for name, value in defaults.items():
        if isinstance(value, dict) and name.endswith("_config"):
            settings[name] = {**value, **_reduced(value)}
            continue
        if isinstance(value, list) and (name.endswith("layer_types") or name in ("mlp_layer_types", "attention_types")):
            kinds = list(dict.fromkeys(value))
            settings[name] = (kinds * layers)[:layers]
            continue
        if isinstance(value, bool) or not isinstance(value, (int, list, type(None), float)):
            if name.startswith("use_") and "kernel" in name:
                settings[name] = False
            continue
        for pattern, small in _RULES:
            if re.search(pattern, name):
                fits = isinstance(value, list) == isinstance(small, list)
                if fits and (value is not None or name.endswith(_EVEN_IF_NONE)):
                    settings[name] = small
                break
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:  # latent attention: as many as there are heads
        settings["num_key_value_heads"] = settings.get("num_attention_heads", 4)
    return settings


def tiny_model(model_type: str, class_name: str) -> Any:
    """A small model with seeded weights that are large enough for every token to matter, in evaluation mode."""
    made: Any = getattr(transformers, class_name, None) or _class(model_type, class_name)
    with torch.device("meta"):
        if sum(one.numel() for one in made(tiny_config(model_type)).parameters()) > 3_000_000:
            raise MemoryError("the rules leave it too large")
    torch.manual_seed(0)
    model: nn.Module = made(tiny_config(model_type))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def _class(model_type: str, class_name: str) -> Any:
    module = importlib.import_module(f"transformers.models.{model_type.replace('-', '_')}")
    return getattr(module, class_name)
