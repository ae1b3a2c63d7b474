//! The text model of a model of text and images.

#[path = "fixtures/mod.rs"]
mod fixtures;

use bitstack_model::{Checkpoint, ModelConfig};
use fixtures::{checkpoint, tensors, write_tensors};
use safetensors::Dtype;
use serde_json::{Value, json};

/// Names as older versions of the library write them, and newer ones.
const STYLES: [fn(&str) -> String; 2] =
    [|name| format!("language_model.{name}"), |name| name.replacen("model.", "model.language_model.", 1)];

#[test]
fn the_text_model_of_gemma_3_with_images_is_gemma_3() {
    let text = checkpoint("gemma3");
    // The whole model does not cap its logits.
    let mut expected: Value = serde_json::from_str(text.config_text()).unwrap();
    expected["final_logit_softcapping"] = Value::Null;
    let expected = ModelConfig::from_json(&expected.to_string()).unwrap();
    for (style, vision) in STYLES.into_iter().zip(["vision_tower.x.weight", "model.vision_tower.x.weight"]) {
        let directory = tempfile::tempdir().unwrap();
        let mut inner: Value = serde_json::from_str(text.config_text()).unwrap();
        for field in ["architectures", "eos_token_id", "tie_word_embeddings"] {
            inner.as_object_mut().unwrap().remove(field);
        }
        let whole = json!({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1],
            "text_config": inner, "vision_config": {"hidden_size": 8}, "image_token_index": 95});
        std::fs::write(directory.path().join("config.json"), whole.to_string()).unwrap();
        let named = tensors(&text).into_iter().map(|(name, values)| (style(&name), values));
        write_tensors(directory.path(), Dtype::BF16, named.chain([(vision.to_owned(), (vec![2, 2], vec![1.0; 4]))]));

        let part = Checkpoint::open(directory.path()).unwrap();
        assert_eq!(part.config(), &expected);
        assert_eq!(tensors(&part), tensors(&text));
        assert!(part.remarks().len() == 1 && part.remarks()[0].contains("images"), "{:?}", part.remarks());
        // What travels with the weights is the config of the text model alone.
        let (name, config) = part.companions().unwrap().remove(0);
        assert_eq!(name, "config.json");
        assert_eq!(ModelConfig::from_json(std::str::from_utf8(&config).unwrap()).unwrap(), expected);
    }
    assert!(text.remarks().is_empty());
}

#[test]
fn sizes_that_a_text_config_leaves_out_are_those_of_the_library() {
    let directory = tempfile::tempdir().unwrap();
    let inner =
        json!({"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 7, "sliding_window": 1024});
    let whole = json!({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": inner});
    std::fs::write(directory.path().join("config.json"), whole.to_string()).unwrap();
    write_tensors(directory.path(), Dtype::BF16, []);
    let part = Checkpoint::open_headers(directory.path(), &Default::default()).unwrap();
    let config = part.config();
    let attention = &config.layers[0].attention;
    assert_eq!((config.vocab_size, config.max_positions), (262_208, 131_072));
    assert_eq!((attention.n_heads, attention.n_kv_heads, attention.head_dim), (8, 4, 256));
    // Every sixth layer sees everything, by the other rotary table.
    let global: Vec<usize> = (0..7).filter(|layer| config.layers[*layer].attention.window.is_none()).collect();
    assert_eq!(global, [5]);
    assert_eq!((config.layers[5].attention.rope, attention.rope), (Some(0), Some(1)));
    assert_eq!((config.ropes[0].theta, config.ropes[1].theta), (1e6, 1e4));
}
