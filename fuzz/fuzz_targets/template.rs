//! Any text, as a chat template and as a `tokenizer_config.json` with one: the text of a conversation or an error, within the bounds on what a
//! template may do.
#![no_main]

use bitstack_model::ModelError;
use bitstack_model::chat::{Answer, ChatTemplate, Message, Role};
use libfuzzer_sys::fuzz_target;

// As in the target `tokenizer`: a panic of the library is caught, and is an error.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |input: &[u8]| {
    let messages = [(Role::System, "Be <brief>."), (Role::User, " a\nb "), (Role::Assistant, "<think>c</think>d")];
    let messages = messages.map(|(role, text)| Message::new(role, text));
    for name in ["chat_template.jinja", "tokenizer_config.json"] {
        let found = ChatTemplate::find(|file| Ok::<_, ModelError>((file == name).then(|| input.to_vec())));
        let Ok(Some(template)) = found else { continue };
        if let Ok(text) = template.at(0).render(&messages, Answer::Opened) {
            // A unit of fuel for 64 bytes, and 300 000 units and some.
            assert!(text.len() < 64 << 20);
        }
    }
});
