//! Keys of a `config.json` that change nothing in a model's logits, whatever they hold: bookkeeping, training, generation.

/// Whether a key changes nothing.
pub(super) fn is_harmless(key: &str) -> bool {
    let starts = ["_", "unsloth_", "use_flash_attention", "use_flash_attn", "output_"];
    let ends = ["_token_id", "_token_ids", "dropout", "_dropout", "_drop", "_pdrop", "dropout_prob"];
    starts.iter().any(|start| key.starts_with(start))
        || ends.iter().any(|end| key.ends_with(end))
        || KEYS.contains(&key)
}

const KEYS: [&str; 63] = [
    // About the file.
    "architectures",
    "auto_map",
    "attn_implementation",
    "dtype",
    "finetuning_task",
    "is_llama_config",
    "model_name",
    "model_type",
    "name_or_path",
    "tokenizer_class",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "use_bfloat16",
    // Training, and how the work is shared out.
    "chunk_size_feed_forward",
    "embd_layer_norm_init",
    "gradient_checkpointing",
    "initializer_range",
    "label_smoothing",
    "pretraining_tp",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "tensor_parallel_size",
    "use_fused_cross_entropy",
    // Heads for other tasks.
    "id2label",
    "label2id",
    "num_labels",
    "prefix",
    "problem_type",
    "task_specific_params",
    // What callers get.
    "return_dict",
    "return_dict_in_generate",
    "use_cache",
    // Limits that somebody wrote down.
    "max_sequence_length",
    "model_max_length",
    // Generation.
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_p",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "penalty_alpha",
    "remove_invalid_values",
    "repetition_penalty",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
];
