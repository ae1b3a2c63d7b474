//! What chat templates expect of Python and of `transformers`, beyond Jinja.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};
use std::fmt::Write;

/// An environment as `transformers` makes it: blocks take the line end behind them and the indentation before them, `break` and `continue`,
/// methods of strings, lists and dictionaries, `tojson`, `raise_exception`, `strftime_now`.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the delimiters are those of Jinja"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, state, value| {
        payable(state, value, 0)?;
        minijinja::escape_formatter(out, state, value)
    });
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| Err::<Value, _>(Error::new(REFUSAL, message)));
    environment.add_function("strftime_now", |format: &str| strftime(format, &jiff::Zoned::now()));
    environment
}

/// Makes `strftime_now` tell another time, in UTC.
pub(super) fn set_clock(environment: &mut Environment<'static>, unix_seconds: i64) {
    let now = jiff::Timestamp::from_second(unix_seconds).unwrap_or_default().to_zoned(jiff::tz::TimeZone::UTC);
    environment.add_function("strftime_now", move |format: &str| strftime(format, &now));
}

/// The kind of what a template says itself: no other error of a template has it.
const REFUSAL: ErrorKind = ErrorKind::BadEscape;

/// What went wrong, in a line: the template's own words, or the library's with the line in the template.
pub(super) fn reason(error: &Error) -> String {
    match (error.kind(), error.detail(), error.line()) {
        (REFUSAL, Some(detail), _) => detail.to_owned(),
        (ErrorKind::OutOfFuel, ..) => "it does more than a chat template needs to".to_owned(),
        (kind, Some(detail), Some(line)) => format!("{kind}: {detail} (line {line})"),
        _ => error.to_string(),
    }
}

/// Pays for a value before it is written: the library counts the text when it is there, and lists of one list are as large as they are deep.
fn payable(state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
        return Ok(());
    }
    if depth > MAX_DEPTH {
        return Err(Error::new(ErrorKind::InvalidOperation, "values in values are too deep to be written"));
    }
    for item in value.try_iter()? {
        state.consume_fuel(1)?;
        let inner = if value.kind() == ValueKind::Map { value.get_item(&item)? } else { item };
        state.consume_fuel(inner.as_str().map_or(0, |text| text.len() as u64 / 64))?;
        payable(state, &inner, depth + 1)?;
    }
    Ok(())
}

fn strftime(format: &str, now: &jiff::Zoned) -> Result<String, Error> {
    let bad = |reason: String| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {reason}"));
    // A width would ask for as many characters.
    let mut after_percent = format.split('%').skip(1);
    if after_percent.any(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
        return Err(bad("a width is not supported".to_owned()));
    }
    jiff::fmt::strtime::format(format, now).map_err(|e| bad(e.to_string()))
}

/// `{% generation %}` and `{% endgeneration %}`, which mark the model's own text for training, as blocks that do nothing.
pub(super) fn without_generation_tags(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, tag)) = rest.split_once("{%") {
        out.push_str(before);
        out.push_str("{%");
        rest = tag;
        let inside = tag.trim_start_matches(['-', '+']);
        let name = inside.trim_start();
        for (old, new) in [("generation", "if true"), ("endgeneration", "endif")] {
            let after = name
                .strip_prefix(old)
                .filter(|after| after.trim_start().trim_start_matches(['-', '+']).starts_with("%}"));
            if let Some(after) = after {
                out.push_str(&tag[..tag.len() - name.len()]);
                out.push_str(new);
                rest = after;
            }
        }
    }
    out + rest
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(state: &State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<Value> = options.get("indent")?;
    let indent = match indent.filter(|v| !v.is_none()) {
        None => None,
        Some(v) if v.as_str().is_some() => v.as_str().map(str::to_owned),
        Some(v) => Some(" ".repeat(usize::try_from(v)?.min(MAX_INDENT))),
    };
    if indent.as_ref().is_some_and(|text| text.len() > MAX_INDENT) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the indentation is too long"));
    }
    let separators: Option<Value> = options.get("separators")?;
    let (item, key) = match separators.filter(|v| !v.is_none()) {
        Some(v) => (v.get_item_by_index(0)?.to_string(), v.get_item_by_index(1)?.to_string()),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let flag = |name| Ok::<_, Error>(options.get::<Option<Value>>(name)?.is_some_and(|v| v.is_true()));
    let (ascii, sorted) = (flag("ensure_ascii")?, flag("sort_keys")?);
    options.assert_all_used()?;
    let mut json = Json { state, indent, item, key, ascii, sorted, out: String::new(), charged: 0 };
    json.value(value, 0)?;
    json.charge()?;
    Ok(Value::from(json.out))
}

/// Python's `repr` of a number that is not an integer: the fewest digits that name it, an exponent of at least two.
fn float(value: f64) -> String {
    let text = format!("{value:?}");
    match text.split_once('e') {
        _ if value.is_nan() => "NaN".to_owned(),
        _ if value.is_infinite() => if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

/// Most characters of one step of indentation.
const MAX_INDENT: usize = 64;
/// Deepest nesting of what is written.
const MAX_DEPTH: usize = 128;

/// A JSON text in the making.
struct Json<'s, 'e, 't> {
    state: &'s State<'e, 't>,
    indent: Option<String>,
    item: String,
    key: String,
    ascii: bool,
    sorted: bool,
    out: String,
    /// Bytes of `out` that were paid for.
    charged: usize,
}

impl Json<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: values in values are too deep"));
        }
        self.charge()?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => self.out.push_str(&float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.list('{', '}', depth, &keys, |json, key| {
                    json.string(&key.to_string());
                    json.out.push_str(&json.key.clone());
                    json.value(&value.get_item(key)?, depth + 1)
                })?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list('[', ']', depth, &items, |json, item| json.value(item, depth + 1))?;
            }
            kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {kind} is no JSON value"))),
        }
        Ok(())
    }

    fn list(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: &[Value],
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.out.push_str(&self.item);
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            (0..depth).for_each(|_| self.out.push_str(indent));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }

    /// Pays for what was written since the last time.
    fn charge(&mut self) -> Result<(), Error> {
        const BYTES_PER_FUEL: usize = 4;
        let fuel = (self.out.len() - self.charged) / BYTES_PER_FUEL;
        self.charged += fuel * BYTES_PER_FUEL;
        self.state.consume_fuel(fuel as u64)
    }
}
