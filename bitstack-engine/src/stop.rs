//! Texts that end a generation, found in text that comes in pieces.

use crate::EngineError;

/// Holds text back while it may be the beginning of a stop string, and cuts it where one is complete.
///
/// The stop string that is complete first ends the text, so that the result is the same however the text is cut into pieces; of several that
/// end at the same character, the longest.
#[derive(Debug, Clone, Default)]
pub(crate) struct StopStrings {
    texts: Vec<String>,
    /// Text that was not given out yet.
    held: String,
}

impl StopStrings {
    /// # Errors
    /// [`EngineError::EmptyStop`].
    pub(crate) fn new(texts: &[String]) -> Result<Self, EngineError> {
        if texts.iter().any(String::is_empty) {
            return Err(EngineError::EmptyStop);
        }
        Ok(Self { texts: texts.to_vec(), held: String::new() })
    }

    /// The text that is given out after `piece`, and whether a stop string has ended it.
    pub(crate) fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let ends = self.texts.iter().filter_map(|text| self.held.find(text).map(|start| (start + text.len(), start)));
        if let Some((_, start)) = ends.min() {
            let mut out = self.finish();
            out.truncate(start);
            return (out, true);
        }
        let may_begin = |at: &usize| self.texts.iter().any(|text| text.starts_with(&self.held[*at..]));
        let longest = self.texts.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest.saturating_sub(1));
        let cut = (first..self.held.len()).filter(|at| self.held.is_char_boundary(*at)).find(may_begin);
        let rest = self.held.split_off(cut.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, now that no more will come.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stops(texts: &[&str]) -> StopStrings {
        StopStrings::new(&texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    /// All that is given out of a text in pieces of up to `len` characters.
    fn given(texts: &[&str], text: &str, len: usize) -> (String, bool) {
        let (mut stops, mut out) = (stops(texts), String::new());
        for piece in text.chars().collect::<Vec<_>>().chunks(len) {
            let (more, stopped) = stops.push(&String::from_iter(piece));
            out += &more;
            if stopped {
                return (out, true);
            }
        }
        (out + &stops.finish(), false)
    }

    #[test]
    fn text_ends_before_the_first_complete_stop_string_however_it_is_cut() {
        for (texts, text, expected) in [
            (&["END"][..], "the END of it", Some("the ")),
            (&["END"], "the EN of it", None),
            (&["aab"], "aaab", Some("a")),
            (&["abc", "b"], "xabc", Some("xa")),
            (&["ab", "b"], "xab", Some("x")),
            (&["\n\n", "\nUser:"], "one\nUse \nUser: two", Some("one\nUse ")),
            (&["日本"], "今日本語", Some("今")),
            (&["é日"], "caféé日", Some("café")),
            (&[], "anything", None),
        ] {
            for len in 1..=text.len() {
                let expected = (expected.unwrap_or(text).to_owned(), expected.is_some());
                assert_eq!(given(texts, text, len), expected, "{texts:?} in pieces of {len}");
            }
        }
    }

    #[test]
    fn only_what_may_begin_a_stop_string_is_held_back() {
        let mut stops = stops(&["STOP"]);
        assert_eq!(stops.push("a S"), ("a ".to_owned(), false));
        assert_eq!(stops.push("T"), (String::new(), false));
        assert_eq!(stops.push("x"), ("STx".to_owned(), false));
        assert_eq!(stops.push("S"), (String::new(), false));
        assert_eq!(stops.finish(), "S");
        assert!(matches!(StopStrings::new(&[String::new()]), Err(EngineError::EmptyStop)));
    }
}
