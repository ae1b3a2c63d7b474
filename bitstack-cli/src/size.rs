//! Sizes as people write them: `4GiB`, `4GB`, `300MB`, `1.5 GB`, `1500000`.

/// Parses a number of bytes; decimal and binary units, any case.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1000,
        "m" | "mb" => 1000_u64.pow(2),
        "g" | "gb" => 1000_u64.pow(3),
        "t" | "tb" => 1000_u64.pow(4),
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(format!("unknown unit '{}': use B, kB, MB, GB, TB, KiB, MiB, GiB or TiB", unit.trim())),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(|| "more bytes than 64 bits can count".into());
    }
    match number.parse::<f64>() {
        Ok(x) if x * (factor as f64) < u64::MAX as f64 => Ok((x * factor as f64) as u64),
        _ => Err("write a number of bytes, with a unit if you like: 300MB, 1.5GiB, 1500000".into()),
    }
}

/// A number of bytes for people: three digits and a decimal unit.
pub(crate) fn show(bytes: u64) -> String {
    let units = ["kB", "MB", "GB", "TB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_as_written() {
        for (text, bytes) in [
            ("1500000", 1_500_000),
            ("4GiB", 4 << 30),
            ("4gb", 4_000_000_000),
            ("300MB", 300_000_000),
            ("1.5 MB", 1_500_000),
            ("0.5KiB", 512),
            ("12b", 12),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_is_rejected_with_advice() {
        for text in ["", "GB", "-1", "1.2.3MB", "4 gigs", "1e9", "20000000000GB", "99999999999999999999", "nan"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_with_three_digits() {
        for (bytes, text) in
            [(999, "999 B"), (1000, "1.00 kB"), (29_369_344, "29.4 MB"), (999_900, "1.00 MB"), (123_456_789, "123 MB")]
        {
            assert_eq!(show(bytes), text);
        }
    }
}
