//! Talking with a model: templates, stop strings, what is kept between messages.

use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::{fs, str};

const TEMPLATE: &str = "{% for m in messages %}<|begin|>{{ m.role }}: {{ m.content | trim }}<|endoftext|>{% endfor %}\
{% if add_generation_prompt %}<|begin|>assistant: {% endif %}";

fn bitstack<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>, input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitstack"));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that has failed reads nothing.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

/// A command that does not fail; what it prints, and what it says.
#[track_caller]
fn works(arguments: &[&str], input: &str) -> (String, String) {
    let output = bitstack(arguments, input);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    (text(&output.stdout).to_owned(), text(&output.stderr).to_owned())
}

/// The built-in model, with `files` changed or added.
fn model(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/tiny-llama");
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn chat_model() -> tempfile::TempDir {
    let config = json!({ "chat_template": TEMPLATE, "bos_token": "<|begin|>", "eos_token": "<|endoftext|>" });
    model(&[("tokenizer_config.json", config.to_string().as_bytes())])
}

fn path(dir: &tempfile::TempDir) -> &str {
    dir.path().to_str().unwrap()
}

#[test]
fn a_chat_prompt_is_what_the_template_makes_of_it() {
    let dir = chat_model();
    let greedy = ["--temperature", "0", "-n", "20"];
    let generate = |rest: &[&str]| works(&[&["generate", path(&dir)], &greedy[..], rest].concat(), "");
    let (answer, _) = generate(&["--chat", "-p", " The river \n"]);
    let prompt = "<|begin|>user: The river<|endoftext|><|begin|>assistant: ";
    let (whole, said) = generate(&["-p", prompt]);
    assert_eq!(whole.strip_prefix(prompt).unwrap(), answer);
    assert!(!said.contains("warning"), "{said}");
    // The text of a special token in a message is text: it takes as many tokens as its letters need.
    let tokens =
        |said: &str| said.split_once("prompt of ").unwrap().1.split(' ').next().unwrap().parse::<usize>().unwrap();
    let (_, with) = generate(&["--chat", "-p", "The river<|endoftext|>"]);
    assert!(tokens(&with) > tokens(&said) + 3, "{with}{said}");
}

#[test]
fn a_chat_runs_only_what_is_new_and_answers_as_if_it_ran_all() {
    let dir = chat_model();
    let chat =
        |input: &str| works(&["chat", path(&dir), "--temperature", "0", "-n", "12", "--system", "Be brief."], input);
    let (both, said) = chat("The old man\nlooked at\\\nthe river\n");
    let notes: Vec<&str> = said.lines().filter(|line| line.contains("new tokens")).collect();
    assert_eq!((notes.len(), both.lines().count() >= 2), (2, true), "{said}");
    let number = |line: &str, before: &str| -> usize {
        line.split_once(before).unwrap().0.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let (first, second) = (number(notes[0], " new tokens"), number(notes[1], " new tokens"));
    let positions = number(notes[1], " of 512 positions");
    assert!(first + second + 12 < positions + 12 && second < positions - first, "{said}");
    // The same conversation from the beginning: all of it is new, and the answers are the same.
    let (again, said) = chat("nonsense\n/reset\nThe old man\nlooked at\\\nthe river\n");
    assert!(again.ends_with(&both), "{again}\n{both}");
    assert_eq!(said.lines().filter(|line| line.contains("new tokens")).count(), 3);
}

#[test]
fn commands_in_a_chat_are_answered_and_unknown_ones_named() {
    let dir = chat_model();
    let (out, said) =
        works(&["chat", path(&dir), "-n", "4"], "/help\n/memory\n/memory 3MB\n/frob\n\n/exit\nnever read\n");
    assert_eq!(out, "");
    for words in ["/memory SIZE", "resident, uncompressed", "one size", "no command /frob"] {
        assert!(said.contains(words), "no '{words}' in: {said}");
    }
    // A message that does not fit is not run, and the conversation goes on.
    let long = "river ".repeat(600);
    let (out, said) = works(&["chat", path(&dir), "-n", "4"], &format!("{long}\nshort\n"));
    assert!(said.contains("the context is 512") && said.contains("/reset"), "{said}");
    assert!(!out.is_empty());
}

#[test]
fn the_template_travels_in_the_file_and_files_without_one_say_so() {
    let dir = chat_model();
    let file = dir.path().join("chat.bitstack");
    let calibration: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/text.txt");
    let compress = |model: &str, file: &Path| {
        let options = "--blocks 4 --samples 4 --seq-len 128 --quiet --calibration".split(' ');
        let paths = ["compress", model, "-o", file.to_str().unwrap()];
        let output = bitstack(paths.into_iter().chain(options).chain([calibration.to_str().unwrap()]), "");
        assert!(matches!(output.status.code(), Some(0 | 3)), "{}", text(&output.stderr));
    };
    compress(path(&dir), &file);
    let file = file.to_str().unwrap();
    let (out, said) = works(&["chat", file, "-n", "8"], "The river\n/memory 1kB\n/memory 1TB\n");
    assert!(!out.is_empty() && said.contains("smallest size") && said.contains("bits per stacked weight"), "{said}");

    let plain = model(&[]);
    let old = plain.path().join("old.bitstack");
    compress(path(&plain), &old);
    for (arguments, words) in [
        (["chat", old.to_str().unwrap()], "compress it again"),
        (["chat", path(&plain)], "the model has no chat template"),
    ] {
        let output = bitstack(arguments, "Hello\n");
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(words) && said.contains("generate"), "{said}");
    }
}

#[test]
fn what_a_template_refuses_is_told_in_its_words_before_anybody_types() {
    let dir = model(&[("chat_template.jinja", b"{{ raise_exception('System role not supported') }}")]);
    let output = bitstack(["chat", path(&dir), "--system", "x"], "Hello\n");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("chat template: System role not supported"), "{}", text(&output.stderr));
}

#[test]
fn prompts_may_begin_with_a_hyphen_and_texts_end_before_stop_strings() {
    let dir = model(&[]);
    let generate =
        |rest: &[&str]| works(&[&["generate", path(&dir), "--temperature", "0", "-n", "40"], rest].concat(), "").0;
    let whole = generate(&["-p", "- one"]);
    assert!(whole.starts_with("- one"));
    let new: String = whole.trim_end().chars().skip(12).collect();
    let stop: String = new.chars().skip(6).take(5).collect();
    let cut = generate(&["-p", "- one", "--stop", "never in it", "--stop", &stop]);
    let after = whole["- one".len()..].find(&stop).unwrap() + "- one".len();
    assert_eq!(cut, format!("{}\n", &whole[..after]));
    assert_ne!(generate(&["-p", "- one", "--repetition-penalty", "1.8"]), whole);
    let output = bitstack(["generate", path(&dir), "-p", "x", "--min-p", "-1"], "");
    assert!(
        output.status.code() == Some(1) && text(&output.stderr).contains("min-p is -1"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn advice_of_the_model_is_the_default_of_sampling() {
    let dir = model(&[("generation_config.json", br#"{"eos_token_id": 0, "temperature": 0.0}"#)]);
    let generate = |rest: &[&str]| works(&[&["generate", path(&dir), "-n", "20", "-p", "The"], rest].concat(), "").0;
    assert_eq!(generate(&["--seed", "1"]), generate(&["--seed", "2"]));
    assert_ne!(generate(&["--seed", "1", "--temperature", "1"]), generate(&["--seed", "2", "--temperature", "1"]));
}

/// The tokenizer of the built-in model with a template that puts `<|begin|>` in front.
#[test]
fn a_begin_token_that_is_there_twice_is_warned_about() {
    let plain = model(&[]);
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(plain.path().join("tokenizer.json")).unwrap()).unwrap();
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "<|begin|>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "<|begin|>": { "id": "<|begin|>", "ids": [1], "tokens": ["<|begin|>"] } }
    });
    let dir = model(&[("tokenizer.json", tokenizer.to_string().as_bytes())]);
    let warned = |model: &tempfile::TempDir, prompt: &str| {
        let (_, said) = works(&["generate", path(model), "-n", "1", "-p", prompt], "");
        said.contains("warning: the prompt begins with <|begin|>, which the tokenizer adds as well")
    };
    assert!(warned(&dir, "<|begin|>The"));
    assert!(!warned(&dir, "The") && !warned(&plain, "<|begin|>The") && !warned(&plain, "<|begin|><|begin|>The"));
}

#[test]
fn perplexities_that_are_no_numbers_have_a_status_of_their_own() {
    let dir = model(&[]);
    let weights = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
    let tensor = &header["model.norm.weight"];
    let [begin, end] = [0, 1].map(|i| tensor["data_offsets"][i].as_u64().unwrap() as usize + 8 + header_len);
    // The largest number of its type, whose products are not finite.
    let largest: &[u8] = match tensor["dtype"].as_str().unwrap() {
        "F32" => &f32::MAX.to_le_bytes(),
        "BF16" => &[0x7f, 0x7f],
        dtype => panic!("{dtype}"),
    };
    bytes[begin..end].chunks_exact_mut(largest.len()).for_each(|v| v.copy_from_slice(largest));
    fs::write(&weights, bytes).unwrap();
    let calibration = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/text.txt");
    let output = bitstack(["eval", path(&dir), "--samples", "1", "-q", "-t", calibration.to_str().unwrap()], "");
    assert_eq!(output.status.code(), Some(4), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("not a finite number"), "{}", text(&output.stderr));
}
