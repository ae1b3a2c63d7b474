//! The command line.

use super::size;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Run a language model at any memory size.
///
/// A model is compressed once, into one file of blocks sorted by importance. The first blocks are a small model, more blocks a better
/// one: the same file serves at every size.
#[derive(Debug, Parser)]
#[command(name = "bitstack", version, propagate_version = true, arg_required_else_help = true)]
#[command(after_help = "Start with `bitstack demo`: it compresses a small built-in model and shows every step.\n\
Sizes are written 4GiB, 4GB, 300MB or 1500000. Results go to stdout, everything else to stderr.\n\
Exit status: 0 success, 1 failure, 2 wrong usage, 3 written, but far from the original (compress), 4 a result is not a number (eval).")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// Print no progress and no remarks, only results and errors.
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,

    /// Threads to use [default: all cores].
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compress a Hugging Face model, or a GGUF file, into one .bitstack file.
    Compress(Compress),
    /// Show what is in a file: weights, blocks, sizes, the load order.
    Inspect(Inspect),
    /// Check every hash of a file; names what is damaged.
    Verify(Verify),
    /// Say what would be loaded in a given memory size.
    Plan(Plan),
    /// Write a smaller file that holds what fits in a given memory size.
    Truncate(Truncate),
    /// Measure quality at one or many sizes: perplexity, KL divergence, agreement.
    Eval(Eval),
    /// Generate text at a given memory size.
    Generate(Generate),
    /// Talk with a model, at a memory size that may change meanwhile.
    Chat(Chat),
    /// Turn a checkpoint of the published implementation into one .bitstack file.
    Import(Import),
    /// Write the model at a given memory size as a directory that other programs load.
    Export(Export),
    /// Measure the speed of the parts on this machine.
    #[command(subcommand)]
    Bench(Bench),
    /// Compress a small built-in model, draw its curve and let it talk at three sizes.
    Demo(Demo),
}

/// How a model directory is opened.
#[derive(Debug, Default, Args)]
pub(crate) struct Opening {
    /// Leave tensors be that the model does not use: their names, with * and ?; may be given several times. A model directory that has others is refused.
    #[arg(long, value_name = "PATTERN")]
    pub(crate) ignore_tensors: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "What is finished is kept in OUT.bitstack.partial until the file is complete. However the command ends before that, \
Ctrl-C, a full disk, a power cut, the same command goes on from there and writes the same bytes.\n\n\
At the end the file is measured against the model, from its smallest size to the largest; inspect and plan show it later. Where it is far \
from the model even as a whole, a warning names the weights that cost most, and the exit status is 3. The file is written all the same.\n\n\
Models of the Hub are kept in its own cache (HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean there); a download that \
breaks off goes on with the same command. hf:OWNER/NAME/FILE.gguf takes one GGUF file.\n\n\
Examples:\n  bitstack compress Llama-3.2-1B -o llama.bitstack --calibration text.txt\n  \
bitstack compress hf:HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2.bitstack"
)]
pub(crate) struct Compress {
    /// The model: a directory with config.json, *.safetensors and tokenizer.json; a GGUF file; or hf:OWNER/NAME[@REVISION], which is downloaded.
    #[arg(value_name = "MODEL")]
    pub(crate) model: PathBuf,

    /// The file to write.
    #[arg(long, short, value_name = "OUT.bitstack")]
    pub(crate) output: PathBuf,

    /// Replace the output file if it exists.
    #[arg(long)]
    pub(crate) force: bool,

    /// Begin anew, and throw away what an interrupted run has left.
    #[arg(long)]
    pub(crate) restart: bool,

    /// Print JSON: sizes in bytes, and the quality at each size that was measured.
    #[arg(long)]
    pub(crate) json: bool,

    /// Say at the end where the time went.
    #[arg(long)]
    pub(crate) timings: bool,

    #[command(flatten)]
    pub(crate) opening: Opening,

    #[command(flatten)]
    pub(crate) method: MethodArgs,
}

/// How to compress; shared by `compress` and `demo`.
#[derive(Debug, Args)]
pub(crate) struct MethodArgs {
    /// How a weight becomes blocks.
    #[arg(long, value_enum, default_value_t = Method::Nested)]
    pub(crate) method: Method,

    /// Blocks per weight [default: 16 for avd; for nested 9 to 12, more for weights that matter more].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) blocks: Option<u16>,

    /// Rank of avd's magnitudes [default: 16, or less for small weights]; nested codes have rank 1.
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) rank: Option<u16>,

    /// Keep weights far outside the others in a list beside avd's blocks; the published method does not. Nested codes have one where it pays.
    #[arg(long)]
    pub(crate) spikes: bool,

    /// How input channels are weighed.
    #[arg(long, value_enum, default_value_t = Scale::Gram)]
    pub(crate) scale: Scale,

    /// Plain text to calibrate on; without it the model writes its own.
    /// For that, and for the third of the calibration that a model of up to two billion weights writes for nested codes, all of it is in memory
    /// at first; then one layer at a time.
    #[arg(long, value_name = "FILE.txt")]
    pub(crate) calibration: Option<PathBuf>,

    /// Windows of calibration text; for nested codes a model of up to two billion weights writes a third of them.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) samples: u32,

    /// Tokens per window [default: 512, at most the model's limit].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1_048_576))]
    pub(crate) seq_len: Option<u32>,

    /// In which order the blocks of the whole model are loaded.
    #[arg(long, value_enum, default_value_t = Order::Gain)]
    pub(crate) order: Order,

    /// Windows of text on which --order perplexity and greedy measure each block; fewer make a rougher order sooner.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) order_windows: u32,

    /// Leave embeddings and output head as they are, as the published method does.
    #[arg(long)]
    pub(crate) keep_embeddings: bool,

    /// Seed of everything random.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Method {
    /// Nested codes: all sign planes of a weight chosen together; a much better model in the same bytes.
    Nested,
    /// Absolute-value decomposition, the published method (arXiv 2410.23918).
    Avd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scale {
    /// Root mean square of each input channel, from the Gram matrix's diagonal.
    Gram,
    /// The published implementation's: norms per sequence, averaged.
    Reference,
    /// All channels alike.
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Order {
    /// Fall of the predicted divergence per byte, from gradients and a model run per layer; checked at eight sizes.
    Gain,
    /// The paper's: level by level, by measured perplexity; one model run per block.
    Perplexity,
    /// The paper's ablation: measured perplexity, any weight may run ahead.
    Greedy,
    /// The paper's ablation: at random.
    Random,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// A .bitstack file.
    pub(crate) file: PathBuf,
    /// Print JSON, with the whole load order.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// A .bitstack file.
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bitstack plan llama.bitstack --memory 3GB")]
pub(crate) struct Plan {
    /// A .bitstack file.
    pub(crate) file: PathBuf,
    /// Memory for the resident weights.
    #[arg(long, short, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) memory: u64,
    /// Print JSON, with the level of every weight.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bitstack truncate llama.bitstack --memory 3GB -o llama-3GB.bitstack")]
pub(crate) struct Truncate {
    /// A .bitstack file.
    pub(crate) file: PathBuf,
    /// Memory for the resident weights of the new file.
    #[arg(long, short, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) memory: u64,
    /// The file to write.
    #[arg(long, short, value_name = "OUT.bitstack")]
    pub(crate) output: PathBuf,
    /// Replace the output file if it exists.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bitstack eval llama.bitstack --text book.txt --memory 2GB --memory 3GB\n  \
bitstack eval llama.bitstack --text book.txt --steps 10 --reference Llama-3.2-1B --plot curve.svg")]
pub(crate) struct Eval {
    /// A .bitstack file, or an uncompressed model as `compress` takes it; several are measured one after another.
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Plain text to measure on.
    #[arg(long, short, value_name = "FILE.txt")]
    pub(crate) text: PathBuf,
    /// A memory size to measure at; may be given several times [default: the whole file].
    #[arg(long, short, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) memory: Vec<u64>,
    /// Measure at N sizes, evenly spaced from the smallest to the whole file.
    #[arg(long, value_name = "N", conflicts_with = "memory", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) steps: Option<u16>,
    /// The original model, as `compress` takes it: adds KL divergence and top-1 agreement with it.
    #[arg(long, value_name = "MODEL")]
    pub(crate) reference: Option<PathBuf>,
    /// Windows of text to measure on, evenly spaced.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) samples: u32,
    /// Tokens per window [default: 512, at most the model's limit].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1_048_576))]
    pub(crate) seq_len: Option<u32>,
    /// Print JSON: one array, an element per size.
    #[arg(long)]
    pub(crate) json: bool,
    /// Draw the curve of size against quality.
    #[arg(long, value_name = "OUT.svg")]
    pub(crate) plot: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) opening: Opening,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bitstack generate llama.bitstack --memory 2GB --prompt \"Once upon a time\"\n  \
bitstack generate llama.bitstack --memory auto --prompt \"Once upon a time\" -n 1000\n  \
bitstack generate llama.bitstack --chat --prompt \"Why is the sky blue?\"\n\n\
On a terminal, + and - change the memory size while the text is written.")]
pub(crate) struct Generate {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// The text to go on from.
    #[arg(long, short, allow_hyphen_values = true)]
    pub(crate) prompt: String,
    /// Take the prompt as a message to the model, in the model's own chat template, and write only the answer.
    #[arg(long)]
    pub(crate) chat: bool,
    /// Tokens to generate at most.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 128)]
    pub(crate) max_tokens: usize,
    #[command(flatten)]
    pub(crate) sampling: Sampling,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bitstack chat llama.bitstack --memory 2GB\n  \
bitstack chat llama.bitstack --memory auto --system \"Answer in one sentence.\"\n\n\
Type a message and Enter; a line that ends with \\ goes on. /memory SIZE changes the memory size, /reset begins anew, /help lists all commands, \
/exit or Ctrl-D ends.\nWhile the model writes, + and - change the memory size, and Ctrl-C stops the answer.")]
pub(crate) struct Chat {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Tell the model how to answer, in a system message.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,
    /// Tokens of an answer at most [default: as many as the model's context has room for].
    #[arg(long, short = 'n', value_name = "N")]
    pub(crate) max_tokens: Option<usize>,
    #[command(flatten)]
    pub(crate) sampling: Sampling,
}

/// A model that writes; shared by `generate` and `chat`.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// A .bitstack file, or an uncompressed model as `compress` takes it.
    pub(crate) file: PathBuf,
    /// Memory for weights, keys and values of the text, and scratch together, or `auto`: what the system has to spare, followed up and down
    /// [default: the whole file].
    #[arg(long, short, value_name = "SIZE|auto", value_parser = Memory::parse)]
    pub(crate) memory: Option<Memory>,
    /// Room for N tokens, all of the text or the conversation; less room leaves more of --memory to the weights [default: as many as the prompt and
    /// -n say; of a conversation the model's limit, and with --memory at most 2048].
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) context: Option<u32>,
    /// Begin as soon as the smallest size is in, and grow while writing. The text then depends on how fast the file is read.
    #[arg(long)]
    pub(crate) progressive: bool,
    /// A chat template in Jinja to use in place of the model's own.
    #[arg(long, value_name = "FILE.jinja")]
    pub(crate) template: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) opening: Opening,
}

/// How tokens are chosen; shared by `generate` and `chat`. What is not given is as the model's generation_config.json advises, else at its default.
#[derive(Debug, Args)]
#[command(
    next_help_heading = "Sampling (defaults are the model's own, from its generation_config.json, where it has some)"
)]
pub(crate) struct Sampling {
    /// 0 takes the likeliest token always; higher is more varied [default: the model's, else 0.8].
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,
    /// Sample among the K likeliest tokens only [default: the model's, else 0: all].
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Sample among the likeliest tokens that together have this probability [default: the model's, else 1].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,
    /// Sample among tokens with at least this fraction of the likeliest one's probability [default: the model's, else 0].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,
    /// Divide the positive logits of tokens that were in the prompt or the text by R, and multiply the others [default: the model's, else 1].
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Take A from the logits of tokens that are in the text already [default: 0].
    #[arg(long, value_name = "A", allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// Take A from the logits of tokens once for every time that they are in the text [default: 0].
    #[arg(long, value_name = "A", allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// End the text before this one; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// Seed of the sampling: the same seed gives the same text.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, Args)]
#[command(
    after_help = "The blocks stay the same bits, and are loaded in the order of the checkpoint's compression_config.json (or, \
without it, of the perplexities in reduced_ppl_average.json).\n\n\
Example:\n  bitstack import Llama-3.1-8B_niter_16_k_16 -o llama.bitstack\n  bitstack generate llama.bitstack --memory 4GB --prompt Once"
)]
pub(crate) struct Import {
    /// A directory written by the published implementation: config.json, *.safetensors with qweight_i, u_i and vt_i, an order file.
    #[arg(value_name = "REFERENCE_DIR")]
    pub(crate) directory: PathBuf,
    /// The file to write.
    #[arg(long, short, value_name = "OUT.bitstack")]
    pub(crate) output: PathBuf,
    /// Replace the output file if it exists.
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) opening: Opening,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bitstack export llama.bitstack --memory 3GB -o llama-3GB        for programs that load Hugging Face \
models\n  bitstack export llama.bitstack --as reference -o llama-blocks    for the published implementation\n\n\
A dense checkpoint is as large as the original model, whatever the memory size: the size decides how good its weights are.\n\
The published layout holds the blocks themselves, of a file made by `compress --method avd --keep-embeddings` or `import`."
)]
pub(crate) struct Export {
    /// A .bitstack file.
    pub(crate) file: PathBuf,
    /// Memory for the resident weights: which blocks are used [default: the whole file].
    #[arg(long, short, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) memory: Option<u64>,
    /// The directory to write.
    #[arg(long, short, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// What to write.
    #[arg(long = "as", value_enum, default_value_t = Layout::Hf)]
    pub(crate) layout: Layout,
    /// Type of the rebuilt weights, with --as hf [default: that of config.json, else bf16].
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) dtype: Option<Float>,
    /// Most bytes of tensors in one file.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size::parse)]
    pub(crate) shard_size: u64,
    /// Replace the output directory if it exists and holds a checkpoint.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Layout {
    /// An ordinary dense Hugging Face checkpoint.
    Hf,
    /// The published implementation's: sign planes and factors, in its names and order of bits.
    Reference,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Float {
    /// 32-bit: exactly the weights that the blocks make.
    F32,
    /// IEEE half precision.
    F16,
    /// Brain float.
    Bf16,
}

/// How much memory the resident weights may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Memory {
    /// So many bytes.
    Bytes(u64),
    /// As much as the system has to spare.
    Auto,
}

impl Memory {
    fn parse(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("auto") { Ok(Self::Auto) } else { size::parse(text).map(Self::Bytes) }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Fast decomposition against full singular value decompositions; nested codes per second.
    Decompose(BenchDecompose),
    /// Products with packed blocks, against a plain read of the same memory and against dense products.
    Kernels(BenchKernels),
    /// A model growing and shrinking, against a plain read of the same file; and what tokens take meanwhile.
    Load(BenchLoad),
    /// A whole model decoding, against a plain read of the same memory.
    Decode(BenchDecode),
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bitstack bench kernels\n  bitstack bench kernels --rows 14336 --cols 4096 --json")]
pub(crate) struct BenchKernels {
    /// Where to compute; cuda needs a build with the feature of that name (cargo install bitstack --features cuda).
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    pub(crate) device: Device,
    /// Rows (output features) of the weight [default: 4096; with cuda the shapes of models of 8 and 70 billion weights].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub(crate) rows: Option<u32>,
    /// Columns (input features) of the weight, a multiple of 8 [default: as for rows].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(8..=1_048_576))]
    pub(crate) cols: Option<u32>,
    /// Memory to stream weights from; more than the caches hold. As much again is taken for dense weights.
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = size::parse)]
    pub(crate) pool: u64,
    /// Seconds to measure each line for.
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    pub(crate) seconds: f64,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    /// The processor.
    Cpu,
    /// The first NVIDIA GPU.
    Cuda,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bitstack bench load llama.bitstack\n  bitstack bench load --shape 8b --blocks 3")]
pub(crate) struct BenchLoad {
    /// A .bitstack file; without one, a model of random planes is made in the directory for temporary files.
    pub(crate) file: Option<PathBuf>,
    /// The shape of that model.
    #[arg(long, value_enum, default_value_t = ModelShape::Llama1b, conflicts_with = "file")]
    pub(crate) shape: ModelShape,
    /// Blocks per weight of that model.
    #[arg(long, value_name = "N", default_value_t = 8, conflicts_with = "file", value_parser = clap::value_parser!(u8).range(2..=16))]
    pub(crate) blocks: u8,
    /// How often to grow and shrink.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) rounds: u16,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bitstack bench decode llama.bitstack --memory 2GB --memory 3GB\n  \
bitstack bench decode --shape 8b --levels 2,3")]
pub(crate) struct BenchDecode {
    /// A .bitstack file; without one, a model of random planes is made in the directory for temporary files.
    pub(crate) file: Option<PathBuf>,
    /// The shape of that model.
    #[arg(long, value_enum, default_value_t = ModelShape::Llama1b, conflicts_with = "file")]
    pub(crate) shape: ModelShape,
    /// Blocks of every weight to measure with.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [2, 3], conflicts_with = "memory", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(crate) levels: Vec<u8>,
    /// A memory size to measure at; may be given several times.
    #[arg(long, short, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) memory: Vec<u64>,
    /// Tokens to decode at every size.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(2..))]
    pub(crate) tokens: u16,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModelShape {
    /// Llama 3.2 1B.
    #[value(name = "1b")]
    Llama1b,
    /// Llama 3.1 8B; a file of it takes 3 GB for every 3 levels.
    #[value(name = "8b")]
    Llama8b,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bitstack bench decompose\n  bitstack bench decompose --shape 8b")]
pub(crate) struct BenchDecompose {
    /// How long nested codes take on all layers of a model of this shape, from a few rows of a weight of each width; instead of comparing
    /// decompositions.
    #[arg(long, value_enum, conflicts_with_all = ["size", "rank", "blocks"])]
    pub(crate) shape: Option<ModelShape>,
    /// Rows and columns of the square test matrix.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(2..=16384))]
    pub(crate) size: u32,
    /// Rank of the blocks.
    #[arg(long, value_name = "K", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) rank: u16,
    /// Blocks of the compared chains.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) blocks: u16,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Where to write the file and the picture.
    #[arg(long, short, value_name = "DIR", default_value = "bitstack-demo")]
    pub(crate) output: PathBuf,
}
