//! Chat templates against `transformers`: the texts in `data/chat/golden.json` are its own (see `make.py` beside them).

use bitstack_model::chat::{Answer, ChatTemplate, Message, Role};
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("data/chat/golden.json")).unwrap()
}

fn messages(of: &Value) -> Vec<Message> {
    let message = |m: &Value| {
        let role = match m["role"].as_str().unwrap() {
            "system" => Role::System,
            "user" => Role::User,
            _ => Role::Assistant,
        };
        Message::new(role, m["content"].as_str().unwrap())
    };
    of.as_array().unwrap().iter().map(message).collect()
}

/// Compares what a template makes of a conversation with what it should, which may be a refusal.
fn check(golden: &Value, template: &str, messages: &[Message], answer: Answer, expected: &Value) -> Result<(), String> {
    let tokens = golden["tokens"].as_object().unwrap();
    let tokens = tokens.iter().map(|(name, text)| (name.clone(), text.as_str().unwrap().to_owned())).collect();
    let found = ChatTemplate::new(template, tokens).map(|t| t.at(golden["now"].as_i64().unwrap()));
    let found = found.and_then(|t| t.render(messages, answer));
    let agrees = match (&found, expected) {
        (Ok(text), Value::String(expected)) => text == expected,
        (Err(error), Value::Object(refused)) => {
            error.to_string() == format!("chat template: {}", refused["refused"].as_str().unwrap())
        }
        _ => false,
    };
    if agrees { Ok(()) } else { Err(format!("{template}\n  found    {found:?}\n  expected {expected:?}\n")) }
}

#[test]
fn conversations_of_every_family_read_as_in_the_reference_library() {
    let golden = golden();
    let mut wrong = Vec::new();
    let families = golden["families"].as_object().unwrap();
    assert!(families.len() >= 17);
    for (name, expected) in families {
        let path = format!("{}/tests/data/chat/{name}.jinja", env!("CARGO_MANIFEST_DIR"));
        let template = std::fs::read_to_string(path).unwrap();
        for (conversation, expected) in
            golden["conversations"].as_array().unwrap().iter().zip(expected.as_array().unwrap())
        {
            let answer = if conversation["answer"].as_bool().unwrap() { Answer::Opened } else { Answer::None };
            let checked = check(&golden, &template, &messages(&conversation["messages"]), answer, expected);
            wrong.extend(checked.err().map(|text| format!("{name}: {text}")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.concat());
}

#[test]
fn expressions_read_as_in_python() {
    let golden = golden();
    let conversation = messages(&golden["messages"]);
    let check = |pair: &Value| check(&golden, pair[0].as_str().unwrap(), &conversation, Answer::Opened, &pair[1]).err();
    let wrong: Vec<String> = golden["expressions"].as_array().unwrap().iter().filter_map(check).collect();
    assert!(wrong.is_empty(), "{}", wrong.concat());
}
