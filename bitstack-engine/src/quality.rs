//! How good a stack is at its sizes: measured when it is made, kept in its file, and read from there.

use bitstack_format::BlockSource;
use serde::{Deserialize, Deserializer, Serialize};

/// The provenance key under which a file keeps its [`Quality`], in the form that FORMAT.md describes.
pub const PROVENANCE_KEY: &str = "quality";

/// A whole file that diverges more than this from its original has lost something, in nats per token. Good formats of 8 bits leave .001 to
/// .002, and of 5 bits .01 to .03: a file with all its blocks that is no better has bytes that do nothing.
pub const FAR_KL: f64 = 0.02;

/// From this divergence on, in nats per token, what a model says is noise: on average it gives what the original says next less than 1/e of the
/// likelihood.
pub const NOISE_KL: f64 = 1.0;

/// The most that a file may claim: of sizes, and of weights that are named.
const MOST: usize = 1024;

/// How good a stack is, from its smallest size to the largest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Predicted tokens that each size was measured on.
    pub tokens: u64,
    /// The sizes, rising; at least one. Those of a file that was truncated may go beyond its end.
    pub sizes: Vec<SizeQuality>,
    /// The weights that cost most when all blocks are loaded, the costliest first.
    pub costliest: Vec<Costly>,
}

/// What was measured at a size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SizeQuality {
    /// Bytes of the tensors loaded.
    pub resident_bytes: u64,
    /// KL(original ‖ stack), nats per token, to 6 digits; infinite where what came out was no number.
    #[serde(deserialize_with = "null_is_infinite")]
    pub kl: f64,
    /// Fraction of tokens for which both find the same token most likely.
    pub top1: f64,
}

/// A weight and what its last error costs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Costly {
    /// Its index among the stacked weights.
    pub weight: usize,
    /// Its share of what all weights are predicted to cost, at most 1: in divergence where single weights were measured for it, else in error of their
    /// outputs relative to that of a rounded weight.
    pub share: f64,
}

/// What is to be expected at a size.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Expected {
    /// As [`SizeQuality::kl`].
    pub kl: f64,
    /// As [`SizeQuality::top1`].
    pub top1: f64,
    /// Whether this size was not measured, but one below and one above.
    pub is_interpolated: bool,
}

impl Expected {
    /// Whether the model is noise at this size: see [`NOISE_KL`].
    pub fn is_noise(&self) -> bool {
        self.kl > NOISE_KL
    }
}

impl Quality {
    /// What a stack says of itself. `None` where it says nothing, or breaks a rule of FORMAT.md: a stack is as usable without.
    pub fn of<S: BlockSource + ?Sized>(source: &S) -> Option<Self> {
        let quality: Self = serde_json::from_str(source.provenance().get(PROVENANCE_KEY)?).ok()?;
        let Self { tokens, sizes, costliest } = &quality;
        let is_share = |x: f64| (0.0..=1.0).contains(&x);
        let is_sound = *tokens > 0
            && (1..=MOST).contains(&sizes.len())
            && costliest.len() <= MOST
            && sizes[0].resident_bytes >= source.base_bytes()
            && sizes.is_sorted_by(|a, b| a.resident_bytes < b.resident_bytes)
            && sizes.iter().all(|s| s.kl >= 0.0 && is_share(s.top1))
            && costliest.iter().all(|c| c.weight < source.weights().len() && is_share(c.share));
        is_sound.then_some(quality)
    }

    /// The largest size that was measured.
    pub fn whole(&self) -> &SizeQuality {
        self.sizes.last().expect("there is at least one size")
    }

    /// Whether the stack is far from its original with all blocks loaded: see [`FAR_KL`].
    pub fn is_far(&self) -> bool {
        self.whole().kl > FAR_KL
    }

    /// What is to be expected of a plan of so many bytes; `None` below the smallest size that was measured and above the largest.
    ///
    /// Between two sizes the logarithms of the divergence and of the disagreement are taken to be linear in bytes: each further bit
    /// of the weights quarters their squared errors.
    pub fn at(&self, resident_bytes: u64) -> Option<Expected> {
        let above = self.sizes.partition_point(|s| s.resident_bytes < resident_bytes);
        let high = self.sizes.get(above)?;
        if high.resident_bytes == resident_bytes {
            return Some(Expected { kl: high.kl, top1: high.top1, is_interpolated: false });
        }
        let low = &self.sizes[above.checked_sub(1)?];
        let share = (resident_bytes - low.resident_bytes) as f64 / (high.resident_bytes - low.resident_bytes) as f64;
        Some(Expected {
            kl: between(low.kl, high.kl, share),
            top1: 1.0 - between(1.0 - low.top1, 1.0 - high.top1, share),
            is_interpolated: true,
        })
    }

    /// The form that files keep, under [`PROVENANCE_KEY`].
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("numbers have a JSON form")
    }
}

/// Infinity has no JSON form of its own.
fn null_is_infinite<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
}

/// On a straight line from `a` to `b`, both at least 0: of logarithms, where there are any.
fn between(a: f64, b: f64, share: f64) -> f64 {
    if a > 0.0 && b > 0.0 { a.powf(1.0 - share) * b.powf(share) } else { a * (1.0 - share) + b * share }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitstack_core::Shape;
    use bitstack_format::Draft;

    fn curve(sizes: &[(u64, f64, f64)]) -> Quality {
        let size = |&(resident_bytes, kl, top1): &(u64, f64, f64)| SizeQuality { resident_bytes, kl, top1 };
        Quality { tokens: 100, sizes: sizes.iter().map(size).collect(), costliest: Vec::new() }
    }

    #[test]
    fn between_two_sizes_a_divergence_falls_as_errors_do_with_each_bit() {
        // 1000 bytes are a bit of each weight: a quarter of the divergence, half of the disagreement.
        let kl = |bytes: u64| 8.0 * 0.25f64.powf(bytes as f64 / 1000.0);
        let top1 = |bytes: u64| 1.0 - 0.5f64.powf(bytes as f64 / 1000.0);
        let measured = [1000, 1700, 2900, 8000].map(|bytes| (bytes, kl(bytes), top1(bytes)));
        let quality = curve(&measured);
        for bytes in (1000..=8000).step_by(100) {
            let e = quality.at(bytes).unwrap();
            assert!((e.kl / kl(bytes) - 1.0).abs() < 1e-12 && (e.top1 - top1(bytes)).abs() < 1e-12, "{bytes}: {e:?}");
            assert_eq!(e.is_interpolated, !measured.iter().any(|m| m.0 == bytes));
            assert_eq!(e.is_noise(), bytes < 1500, "8 / 4^1.5 is 1");
        }
        assert_eq!((quality.at(999), quality.at(8001)), (None, None));
    }

    #[test]
    fn sizes_without_a_logarithm_are_no_obstacle() {
        let quality = curve(&[(10, f64::INFINITY, 0.0), (20, 0.5, 0.9), (30, 0.0, 1.0), (40, f64::INFINITY, 1.0)]);
        let at = |bytes| quality.at(bytes).unwrap();
        assert_eq!((at(15).kl, at(25).kl, at(35).kl), (f64::INFINITY, 0.25, f64::INFINITY));
        assert!(at(15).is_noise() && (0.0..=1.0).contains(&at(15).top1) && (at(25).top1 - 0.95).abs() < 1e-12);
    }

    /// A stack of one weight that says this of itself.
    fn saying(text: &str) -> Draft {
        let mut draft = Draft::create_on(Vec::new(), "memory");
        draft.push_base("norm", bitstack_format::Dtype::F32, &[4], &[0; 16]).unwrap();
        draft.add_weight("w", Shape::new(3, 9).unwrap(), 1, "avd").unwrap();
        draft.set_provenance(PROVENANCE_KEY, text).unwrap();
        draft
    }

    #[test]
    fn a_curve_is_read_as_it_was_written() {
        let mut quality = curve(&[(16, f64::INFINITY, 0.0), (17, 0.333333, 0.666667), (99, 0.0, 1.0)]);
        quality.costliest = vec![Costly { weight: 0, share: 0.142857 }];
        let text = quality.to_json();
        assert!(text.contains(r#"{"resident_bytes":17,"kl":0.333333,"top1":0.666667}"#), "{text}");
        assert_eq!(Quality::of(&saying(&text)), Some(quality.clone()));
        // Fields that a later version may add.
        let more = text.replace("{\"tokens\"", "{\"text\":[{}],\"tokens\"");
        assert_eq!(Quality::of(&saying(&more)), Some(quality));
    }

    #[test]
    fn a_curve_that_breaks_a_rule_is_as_good_as_none() {
        assert_eq!(Quality::of(&Draft::create_on(Vec::new(), "memory")), None);
        let good = r#"{"tokens":9,"sizes":[{"resident_bytes":20,"kl":0.5,"top1":0.9},{"resident_bytes":30,"kl":null,"top1":1}],"costliest":[{"weight":0,"share":1}]}"#;
        assert!(Quality::of(&saying(good)).is_some());
        for end in 0..good.len() {
            assert_eq!(Quality::of(&saying(&good[..end])), None, "{}", &good[..end]);
        }
        let size = r#"{"resident_bytes":20,"kl":0.5,"top1":0.9}"#;
        let many = |n: usize| (20..20 + n).map(|i| size.replace("20", &i.to_string())).collect::<Vec<_>>().join(",");
        let claim = |sizes: String| format!(r#"{{"tokens":9,"sizes":[{sizes}],"costliest":[]}}"#);
        assert!(Quality::of(&saying(&claim(many(MOST)))).is_some());
        assert_eq!(Quality::of(&saying(&claim(many(MOST + 1)))), None);
        assert_eq!(Quality::of(&saying(&claim(String::new()))), None);
        for (from, to) in [
            ("\"tokens\":9", "\"tokens\":0"),
            ("\"tokens\":9", "\"tokens\":-1"),
            ("\"tokens\":9,", ""),
            ("\"tokens\":9", "\"tokens\":9,\"tokens\":9"),
            (":20", ":15"), // less than what is always resident
            (":20", ":30"),
            (":20", ":20.5"),
            (":30", ":18446744073709551616"),
            ("0.5", "-0.5"),
            ("0.5", "1e999"),
            ("0.5", "NaN"),
            ("0.5", "\"0.5\""),
            ("\"kl\":0.5,", ""),
            ("0.9", "1.1"),
            ("0.9", "-0.1"),
            ("0.9", "null"),
            ("\"weight\":0", "\"weight\":1"),
            ("\"weight\":0", "\"weight\":99999999999999999999"),
            ("\"share\":1", "\"share\":2"),
            ("\"sizes\":[", "\"sizes\":[["),
            ("{\"tokens\"", "[{\"tokens\""),
        ] {
            assert!(good.contains(from));
            assert_eq!(Quality::of(&saying(&good.replacen(from, to, 1))), None, "{from} as {to}");
        }
        assert_eq!(Quality::of(&saying(&"[".repeat(1 << 20))), None);
        assert_eq!(Quality::of(&saying("\u{1b}[2J")), None);
    }
}
