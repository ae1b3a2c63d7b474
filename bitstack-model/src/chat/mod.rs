//! Conversations, written as the model's own template writes them.
//!
//! A chat template is a Jinja program in the model's files that turns messages into the text the model was trained on. It is rendered as
//! `transformers` renders it (`apply_chat_template`), with its functions, filters and Python's methods. Like every file it may be made to do harm:
//! it can neither read files nor run anything else, and what it does is counted, instruction by instruction and byte by byte; one that does
//! too much ends in an error.

mod python;

use crate::{ModelError, Tokenizer};
use bitstack_io::hostile::printable;
use minijinja::value::Value;
use minijinja::{Environment, Error};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::Duration;

/// Whose message it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Says how to answer; some templates know no such message.
    System,
    /// Asks.
    User,
    /// Answers: the model.
    Assistant,
}

impl Role {
    /// Its name in templates.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Whose it is.
    pub role: Role,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// Whether the text of a conversation ends with the beginning of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The model's turn is opened (`add_generation_prompt`).
    Opened,
    /// The text ends after the last message.
    None,
}

/// The chat template of a model, with the special tokens that it may write.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and the like, and their texts.
    tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// The files of a model that it is read from. `chat_template.jinja` goes before `tokenizer_config.json`, and that before
    /// `chat_template.json`.
    pub const FILES: [&str; 4] =
        ["chat_template.jinja", "tokenizer_config.json", "chat_template.json", "special_tokens_map.json"];

    /// Most bytes of one of these files: the largest in use have one megabyte.
    const FILE_BYTES: usize = 1 << 24;

    /// Finds the template among a model's files: `read` gives the bytes of each of [`FILES`](Self::FILES), or none where there is no such
    /// file. `None` when no file has a template.
    ///
    /// # Errors
    /// Those of `read`; files that are not what they should be; several named templates, none of which is the default; a template that is not
    /// written in Jinja.
    pub fn find<E: From<ModelError>>(
        mut read: impl FnMut(&str) -> Result<Option<Vec<u8>>, E>,
    ) -> Result<Option<Self>, E> {
        let mut text = |name: &str| -> Result<Option<String>, E> {
            let Some(bytes) = read(name)? else { return Ok(None) };
            if bytes.len() > Self::FILE_BYTES {
                let limit = Self::FILE_BYTES as u64;
                return Err(ModelError::FileTooLarge { path: name.into(), bytes: bytes.len() as u64, limit }.into());
            }
            let text = String::from_utf8(bytes);
            Ok(Some(text.map_err(|_| ModelError::ChatTemplate { reason: format!("{name} is not UTF-8 text") })?))
        };
        let [jinja, config, other, map] = Self::FILES.map(&mut text);
        let (config, map) = (object(Self::FILES[1], config?)?, object(Self::FILES[3], map?)?);
        let template = match jinja? {
            Some(template) => Some(template),
            None => match named(&config)? {
                Some(template) => Some(template),
                None => named(&object(Self::FILES[2], other?)?)?,
            },
        };
        let Some(template) = template else { return Ok(None) };
        let mut tokens = Vec::new();
        for (name, value) in config.iter().chain(&map) {
            let text = value.as_str().or_else(|| value.get("content")?.as_str());
            if let Some(text) = text.filter(|_| name.ends_with("_token"))
                && !tokens.iter().any(|(known, _)| known == name)
            {
                tokens.push((name.clone(), text.to_owned()));
            }
        }
        Ok(Some(Self::new(&template, tokens)?))
    }

    /// A template, with the names and texts of the special tokens that it may use, such as `bos_token`.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] when it is not written in Jinja.
    pub fn new(template: &str, tokens: Vec<(String, String)>) -> Result<Self, ModelError> {
        let environment = guarded(|| {
            let mut environment = python::environment();
            environment.add_template_owned(NAME, python::without_generation_tags(template))?;
            Ok(environment)
        })?;
        Ok(Self { environment, tokens })
    }

    /// The same template at another time than the present: `strftime_now` tells that of `unix_seconds` in UTC.
    pub fn at(mut self, unix_seconds: i64) -> Self {
        python::set_clock(&mut self.environment, unix_seconds);
        self
    }

    /// The text of special token `name` (`eos_token`), if the model's files say one.
    pub fn token(&self, name: &str) -> Option<&str> {
        self.tokens.iter().find(|(known, _)| known == name).map(|(_, text)| text.as_str())
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`]: a conversation that the template refuses, in its words; one that fails, or takes more than
    /// a thousand instructions per message, some hundred times the bytes of the text, or ten seconds.
    pub fn render(&self, messages: &[Message], answer: Answer) -> Result<String, ModelError> {
        let bytes: usize = messages.iter().map(|m| m.content.len()).sum();
        let fuel = FUEL + FUEL_PER_MESSAGE * messages.len() as u64 + bytes as u64;
        let message =
            |m: &Message| minijinja::context! { role => m.role.name(), content => Value::from(m.content.as_str()) };
        let fixed = [
            ("messages", messages.iter().map(message).collect::<Value>()),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(answer == Answer::Opened)),
        ];
        let tokens = self.tokens.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
        let context = Value::from(tokens.chain(fixed).collect::<BTreeMap<_, _>>());
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let failed = |reason: String| ModelError::ChatTemplate { reason };
        let (done, result) = mpsc::sync_channel(1);
        let render = move || {
            let _ = done.send(guarded(|| environment.get_template(NAME)?.render(context)));
        };
        // Values in values in values are dropped one inside the other: as deep as the fuel lets them be.
        let thread = std::thread::Builder::new().name(NAME.to_owned()).stack_size(STACK_BYTES).spawn(render);
        thread.map_err(|error| failed(format!("there is no thread to render it in: {error}")))?;
        result.recv_timeout(PATIENCE).unwrap_or_else(|_| Err(failed("it takes too long".to_owned())))
    }

    /// The tokens of a conversation, the model's turn opened.
    ///
    /// Special tokens are those that the template writes; the tokenizer adds none. The text of one in a message is text: it is cut behind its first
    /// character, and the parts are encoded one by one (with some tokenizers that adds a space there).
    ///
    /// # Errors
    /// As [`render`](Self::render); a tokenizer that fails.
    pub fn encode(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>, ModelError> {
        let special = tokenizer.special_tokens();
        // A character that is in no text: Unicode promises that these never are, and a text that has one of them hardly has them all.
        let cut = ('\u{fdd0}'..='\u{fdef}').find(|c| !messages.iter().any(|m| m.content.contains(*c)));
        let cut = cut.unwrap_or('\u{fdd0}');
        let cut_up = |m: &Message| Message { content: cut_special(&m.content, &special, cut), ..m.clone() };
        let text = self.render(&messages.iter().map(cut_up).collect::<Vec<_>>(), Answer::Opened)?;
        let parts = text.split(cut).filter(|part| !part.is_empty()).map(|part| tokenizer.encode_as_is(part));
        Ok(parts.collect::<Result<Vec<_>, _>>()?.concat())
    }

    /// The tokens that end an answer: the special token that the template writes behind one, if it does, and the model's `eos_token`.
    ///
    /// The config of a model often has only the token that ends a text.
    pub fn end_tokens(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        const ANSWER: &str = "the answer";
        let messages = [(Role::User, "a"), (Role::Assistant, ANSWER), (Role::User, "b")];
        let messages = messages.map(|(role, text)| Message::new(role, text));
        let behind = self.render(&messages, Answer::None).ok().and_then(|text| {
            let rest = text.split_once(ANSWER)?.1.trim_start().to_owned();
            tokenizer.special_tokens().into_iter().find(|token| rest.starts_with(token))
        });
        let texts = behind.into_iter().chain(self.token("eos_token").map(str::to_owned));
        let mut tokens: Vec<u32> = texts.filter_map(|text| tokenizer.special_token_id(&text)).collect();
        tokens.dedup();
        tokens
    }
}

const NAME: &str = "chat template";
const GAVE_UP: &str = "the template library gave up";

/// What a template may do, in the template library's units: an instruction each, and 64 bytes of text each. Templates in use take some
/// hundreds.
const FUEL: u64 = 300_000;
const FUEL_PER_MESSAGE: u64 = 1000;
/// The library does not count all it does: adding lists is free. A thread that takes longer is left to itself.
const PATIENCE: Duration = Duration::from_secs(10);
/// Address space; memory is taken only as deep as a template goes.
const STACK_BYTES: usize = 256 << 20;

/// The library's answer; a panic of its own is an error too.
fn guarded<T>(f: impl FnOnce() -> Result<T, Error>) -> Result<T, ModelError> {
    let reason = match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => python::reason(&error),
        Err(_) => GAVE_UP.to_owned(),
    };
    Err(ModelError::ChatTemplate { reason: printable(&reason) })
}

type Object = serde_json::Map<String, serde_json::Value>;

/// A file that is a JSON object; an empty one where there is no file.
fn object(name: &str, text: Option<String>) -> Result<Object, ModelError> {
    let Some(text) = text else { return Ok(Object::new()) };
    serde_json::from_str(&text).map_err(|source| ModelError::Json { file: name.to_owned(), source })
}

/// The template of a config: a text, or a list of named ones, of which the default is taken.
fn named(config: &Object) -> Result<Option<String>, ModelError> {
    let bad = |reason: String| Err(ModelError::ChatTemplate { reason });
    match config.get("chat_template") {
        None | Some(serde_json::Value::Null) => Ok(None),
        Some(serde_json::Value::String(text)) => Ok(Some(text.clone())),
        Some(serde_json::Value::Array(list)) => {
            let field = |entry: &serde_json::Value, name: &str| Some(entry.get(name)?.as_str()?.to_owned());
            let names: Vec<String> = list.iter().filter_map(|entry| field(entry, "name")).collect();
            match list.iter().find(|entry| field(entry, "name").is_some_and(|name| name == "default")) {
                Some(entry) => match field(entry, "template") {
                    Some(template) => Ok(Some(template)),
                    None => bad("the template named default has no text".to_owned()),
                },
                None => bad(format!(
                    "none of the model's templates ({}) is named default; write the one to use to chat_template.jinja",
                    printable(&names.join(", "))
                )),
            }
        }
        Some(_) => bad("chat_template is neither a text nor a list of named ones".to_owned()),
    }
}

/// `text` with `cut` behind the first character of every special token in it.
fn cut_special(text: &str, special: &[String], cut: char) -> String {
    let mut out = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        out.push(c);
        if special.iter().any(|token| token.len() > c.len_utf8() && text[at..].starts_with(token.as_str())) {
            out.push(cut);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of two messages.
    fn render(template: &str) -> Result<String, ModelError> {
        let tokens = vec![("bos_token".to_owned(), "<s>".to_owned())];
        let messages = [Message::new(Role::User, "  Hi <b>&'\" ü  "), Message::new(Role::Assistant, "Yo\n")];
        ChatTemplate::new(template, tokens)?.at(1_700_000_000).render(&messages, Answer::Opened)
    }

    #[test]
    fn a_refusal_is_in_the_words_of_the_template() {
        let refused = render("{% if messages %}{{ raise_exception('System role not supported') }}{% endif %}");
        assert_eq!(refused.unwrap_err().to_string(), "chat template: System role not supported");
        for template in
            ["{% if %}", "{{ messages.foo.bar }}", "{{ nothing() }}", "{% include 'x' %}", "{{ 'a' | nofilter }}"]
        {
            let error = render(template).unwrap_err().to_string();
            assert!(error.starts_with("chat template: ") && error.lines().count() == 1, "{error}");
        }
    }

    #[test]
    fn a_template_that_does_too_much_is_an_error() {
        for template in [
            "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
            "{{ 'x' * 1000000000 }}",
            "{% set ns = namespace(x='xxxxxxxxxxxxxxxx') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "{% set ns = namespace(x='xxxxxxxxxxxxxxxx') %}{% for i in range(64) %}{% set ns.x = ns.x.replace('x', ns.x) %}{% endfor %}",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "{% for i in range(100000) %}{{ [1, 2] | tojson(indent=1000000000) }}{% endfor %}",
            "{{ '%1000000000d' | format(1) }}",
            "{{ strftime_now('%4000000000Y') }}",
            "{% set ns = namespace(x=['a' * 1000]) %}{% for i in range(30) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
            "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
            "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=[]) %}{% for i in range(20000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
            "{% set ns = namespace(x=['a' * 1000]) %}{% for i in range(30) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns | tojson }}",
        ] {
            let error = render(template).map(|text| text.len()).map_err(|e| e.to_string());
            assert!(error.as_ref().is_err_and(|e| e.starts_with("chat template: ")), "{template}: {error:?}");
        }
        assert!(ChatTemplate::new(&"{% if a %}".repeat(100_000), Vec::new()).is_err());
        assert!(ChatTemplate::new(&format!("{{{{ {} }}}}", "(".repeat(100_000)), Vec::new()).is_err());
    }

    #[test]
    fn the_template_is_found_where_models_keep_it() {
        let find = |files: &[(&str, &str)]| {
            let read =
                |name: &str| Ok::<_, ModelError>(files.iter().find(|f| f.0 == name).map(|f| f.1.as_bytes().to_vec()));
            let messages = [Message::new(Role::User, "x")];
            ChatTemplate::find(read).map(|found| found.map(|t| t.render(&messages, Answer::None).unwrap()))
        };
        let config =
            r#"{"chat_template": "config {{ bos_token }}", "bos_token": {"content": "<b>"}, "eos_token": null}"#;
        assert_eq!(find(&[]).unwrap(), None);
        assert_eq!(find(&[("tokenizer_config.json", r#"{"bos_token": "<s>"}"#)]).unwrap(), None);
        assert_eq!(find(&[("tokenizer_config.json", config)]).unwrap().unwrap(), "config <b>");
        let both = [("tokenizer_config.json", config), ("chat_template.jinja", "jinja {{ bos_token }}\n")];
        assert_eq!(find(&both).unwrap().unwrap(), "jinja <b>");
        let json = [
            ("chat_template.json", r#"{"chat_template": "json {{ eos_token }}"}"#),
            ("special_tokens_map.json", r#"{"eos_token": "<e>"}"#),
        ];
        assert_eq!(find(&json).unwrap().unwrap(), "json <e>");
        let list = r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}"#;
        assert_eq!(find(&[("tokenizer_config.json", list)]).unwrap().unwrap(), "d");
        let list = r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "tool_use"}]}"#;
        let error = find(&[("tokenizer_config.json", list)]).unwrap_err().to_string();
        assert!(error.contains("rag, tool_use") && error.contains("chat_template.jinja"), "{error}");
        for bad in ["[]", "{\"chat_template\": 3}", "{"] {
            assert!(find(&[("tokenizer_config.json", bad)]).is_err());
        }
    }

    #[test]
    fn special_tokens_in_messages_are_cut_up() {
        let special = ["<|im_end|>", "<s>", "x"].map(str::to_owned);
        assert_eq!(cut_special("a<|im_end|><s>x<", &special, '#'), "a<#|im_end|><#s>x<");
        assert_eq!(cut_special("é<<s>", &special, '#'), "é<<#s>");
    }
}
