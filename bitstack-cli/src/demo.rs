//! `bitstack demo`: everything once, on a model small enough to travel with the program.

use super::args::{Cli, Command, Demo};
use super::open::{Beside, Stack};
use super::progress::Reporter;
use super::{compress, eval, generate, print};
use anyhow::{Context, Result};
use bitstack_engine::stack::{config, tokenizer};
use clap::Parser;
use std::fs;
use std::path::Path;

/// The model's files, in this program.
const MODEL: [(&str, &[u8]); 6] = [
    ("config.json", include_bytes!("../demo/tiny-llama/config.json")),
    ("generation_config.json", include_bytes!("../demo/tiny-llama/generation_config.json")),
    ("model.safetensors", include_bytes!("../demo/tiny-llama/model.safetensors")),
    ("special_tokens_map.json", include_bytes!("../demo/tiny-llama/special_tokens_map.json")),
    ("tokenizer.json", include_bytes!("../demo/tiny-llama/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../demo/tiny-llama/tokenizer_config.json")),
];
const TEXT: &[u8] = include_bytes!("../demo/text.txt");
/// Tokens that it writes at each size.
const TOKENS: usize = 60;
const PROMPT: &str = "The old man looked at the river, and";

/// Unpacks the built-in model and runs the commands on it that a user would, saying which.
pub(crate) fn run(args: &Demo, reporter: &Reporter) -> Result<()> {
    let dir = &args.output;
    let model = dir.join("tiny-llama");
    let write =
        |path: &Path, bytes: &[u8]| fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()));
    fs::create_dir_all(&model).with_context(|| format!("cannot make the directory {}", model.display()))?;
    for (name, bytes) in MODEL {
        write(&model.join(name), bytes)?;
    }
    let (text, file, picture) = (dir.join("text.txt"), dir.join("tiny.bitstack"), dir.join("curve.svg"));
    write(&text, TEXT)?;
    let [model, text, file_name, picture] = [&model, &text, &file, &picture].map(|p| p.display().to_string());

    step(&["compress", &model, "-o", &file_name, "--force"], reporter)?;
    step(
        &["eval", &file_name, &model, "--text", &text, "--steps", "8", "--reference", &model, "--plot", &picture],
        reporter,
    )?;
    let stack = Stack::open(&file, reporter)?;
    let (least, most) = (stack.order.minimum_bytes(), stack.order.total_bytes());
    // The weights of three sizes, and what a text of this length takes beside them.
    let prompt = tokenizer(&stack.file)?.encode(PROMPT)?.len();
    let beside = Beside::new(&config(&stack.file)?, prompt, prompt + TOKENS);
    let tokens = TOKENS.to_string();
    for weights in [least, least + (most - least) / 4, most] {
        let memory = (weights + beside.bytes()).to_string();
        step(
            &[
                "generate",
                &file_name,
                "--memory",
                &memory,
                "--max-tokens",
                &tokens,
                "--top-p",
                "0.9",
                "--prompt",
                PROMPT,
            ],
            reporter,
        )?;
    }
    print(&format!(
        "\nThe file is {file_name}, the picture {picture}. Now your own model:\n  bitstack compress MODEL_DIR -o model.bitstack\n"
    ))
}

/// Shows a command and runs it.
fn step(arguments: &[&str], reporter: &Reporter) -> Result<()> {
    let quote = |a: &&str| if a.contains(' ') { format!("\"{a}\"") } else { (*a).to_owned() };
    print(&format!("\n$ bitstack {}\n", arguments.iter().map(quote).collect::<Vec<_>>().join(" ")))?;
    match Cli::try_parse_from(["bitstack"].iter().chain(arguments))?.command {
        Command::Compress(args) => compress::run(&args, reporter).map(drop),
        Command::Eval(args) => eval::run(&args, reporter).map(drop),
        Command::Generate(args) => generate::run(&args, reporter),
        other => unreachable!("the demonstration has no {other:?}"),
    }
}
