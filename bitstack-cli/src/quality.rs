//! How good a file is at its sizes, as it says itself: for the commands that make it, show it, cut it and use it.

use super::open::{Bits, Stack};
use super::size;
use bitstack_engine::quality::{Expected, FAR_KL, NOISE_KL, Quality};
use bitstack_format::BlockSource;
use serde_json::{Value, json};
use std::fmt::Write;

/// The sizes that were measured, and that of the whole file if it was cut between two.
fn rows(quality: &Quality, most: u64) -> impl Iterator<Item = (u64, Expected)> {
    let sizes = quality.sizes.iter().map(|s| s.resident_bytes).filter(move |bytes| *bytes < most);
    sizes.chain([most]).filter_map(|bytes| Some((bytes, quality.at(bytes)?)))
}

/// The curve of a file; empty for one without.
pub(crate) fn table(stack: &Stack) -> String {
    let Some(quality) = &stack.quality else { return String::new() };
    let mut out = format!("{:>14}  {:>11}  {:>10}  {:>6}\n", "resident bytes", "bits/weight", "KL, nats", "top-1");
    for (bytes, expected) in rows(quality, stack.order.total_bytes()) {
        let Expected { kl, top1, is_interpolated, .. } = expected;
        let bits = stack.bits.per_weight(bytes);
        let note = if is_interpolated { "  interpolated" } else { "" };
        let _ = writeln!(out, "{bytes:14}  {bits:11.3}  {kl:>10.6}  {top1:>6.4}{note}");
    }
    let _ = writeln!(out, "against the original, on {} tokens", quality.tokens);
    out
}

/// The same; `null` for a file without.
pub(crate) fn to_json(stack: &Stack) -> Value {
    let Some(quality) = &stack.quality else { return Value::Null };
    let sizes: Vec<Value> = rows(quality, stack.order.total_bytes())
        .map(|(bytes, e)| {
            json!({
                "resident_bytes": bytes, "bits_per_weight": stack.bits.per_weight(bytes), "kl": e.kl, "top1": e.top1,
                "interpolated": e.is_interpolated,
            })
        })
        .collect();
    let costliest: Vec<Value> =
        costliest(stack, quality).map(|(name, share)| json!({"weight": name, "share": share})).collect();
    json!({"tokens": quality.tokens, "sizes": sizes, "costliest": costliest, "far": quality.is_far()})
}

fn costliest<'s>(stack: &'s Stack, quality: &'s Quality) -> impl Iterator<Item = (&'s str, f64)> {
    quality.costliest.iter().map(|c| (stack.file.weights()[c.weight].name.as_str(), c.share))
}

/// What is to be said of a file that is far from its original with all the blocks that it was made with.
pub(crate) fn far(stack: &Stack) -> Option<String> {
    let quality = stack.quality.as_ref().filter(|q| q.is_far())?;
    let kl = nats(quality.whole().kl);
    let mut text = format!("far from the original even as a whole: KL {kl} nats per token, more than {FAR_KL}");
    let mut between = "; the weights that cost most are ";
    for (name, share) in costliest(stack, quality) {
        let _ = write!(text, "{between}{name} ({:.0} %)", share * 100.0);
        between = ", ";
    }
    Some(text)
}

/// What is to be expected at a size, in a few words that go on a line; nothing where it is not known.
pub(crate) fn brief(quality: Option<&Quality>, resident_bytes: u64) -> String {
    let Some(expected) = quality.and_then(|q| q.at(resident_bytes)) else { return String::new() };
    let about = if expected.is_interpolated { "about " } else { "" };
    format!(", KL {about}{} to the original, top-1 {:.3}", nats(expected.kl), expected.top1)
}

/// The same as a line.
pub(crate) fn sentence(quality: Option<&Quality>, resident_bytes: u64) -> String {
    let Some((quality, e)) = quality.and_then(|q| Some((q, q.at(resident_bytes)?))) else { return String::new() };
    let how = if e.is_interpolated { "interpolated between sizes that were measured" } else { "measured" };
    format!(
        "KL {} nats per token to the original, top-1 agreement {:.3}: {how} on {} tokens\n",
        nats(e.kl),
        e.top1,
        quality.tokens
    )
}

/// The same as JSON; `null` where it is not known.
pub(crate) fn at_json(quality: Option<&Quality>, resident_bytes: u64) -> Value {
    let Some((quality, e)) = quality.and_then(|q| Some((q, q.at(resident_bytes)?))) else { return Value::Null };
    json!({"kl": e.kl, "top1": e.top1, "interpolated": e.is_interpolated, "tokens": quality.tokens})
}

/// The warning about a size at which the model is noise.
pub(crate) fn noise(quality: Option<&Quality>, bits: Bits, resident_bytes: u64) -> Option<String> {
    let quality = quality?;
    let expected = quality.at(resident_bytes).filter(Expected::is_noise)?;
    let mut text = format!(
        "warning: at {} ({:.2} bits per stacked weight) the model is noise: KL {} nats per token to the original",
        size::show(resident_bytes),
        bits.per_weight(resident_bytes),
        nats(expected.kl)
    );
    if let Some(good) = quality.sizes.iter().find(|s| s.resident_bytes > resident_bytes && s.kl <= NOISE_KL) {
        let _ = write!(text, "; {} with {}", nats(good.kl), size::show(good.resident_bytes));
    }
    Some(text)
}

/// A divergence with the digits that it deserves.
fn nats(kl: f64) -> String {
    if kl < 0.1 { format!("{kl:.4}") } else { format!("{kl:.2}") }
}
