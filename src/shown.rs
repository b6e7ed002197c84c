//! Text that holds names from files, for a terminal, a log or a page: what a terminal would obey is escaped.

use std::borrow::Cow;

/// Characters that a terminal obeys instead of showing them, or that turn the order of those around them.
fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

fn escaped(text: &str, kept: impl Fn(char) -> bool) -> Cow<'_, str> {
    let is_bad = |c: char| is_obeyed(c) && !kept(c);
    if !text.contains(is_bad) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_bad(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out.into()
}

/// The text with control characters other than line feeds and tabs as `\r`, `\u{1b}` and so on.
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c == '\n' || c == '\t')
}

/// The text on one line: all control characters as `\n`, `\u{1b}` and so on.
pub fn line(text: &str) -> Cow<'_, str> {
    escaped(text, |_| false)
}

/// `1 step`, `2 steps`.
pub fn counted(n: impl Into<u64>, noun: &str) -> String {
    let n = n.into();
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// `println!` for people: what holds names from files. (JSON has its own escapes.)
macro_rules! say {
    ($($text:tt)*) => { println!("{}", $crate::shown::lines(&format!($($text)*))) };
}

/// [`say`] on standard error.
macro_rules! tell {
    ($($text:tt)*) => { eprintln!("{}", $crate::shown::lines(&format!($($text)*))) };
}

pub(crate) use {say, tell};

#[cfg(test)]
mod tests {
    #[test]
    fn what_a_terminal_obeys_is_escaped() {
        let name = "a\x1b[2J\u{9b}31m\r\x07b\u{202e}c\n\td";
        assert_eq!(super::lines(name), "a\\u{1b}[2J\\u{9b}31m\\r\\u{7}b\\u{202e}c\n\td");
        assert_eq!(super::line(name), "a\\u{1b}[2J\\u{9b}31m\\r\\u{7}b\\u{202e}c\\n\\td");
        for plain in ["", "time step/Ωß", "日本語\n"] {
            assert_eq!(super::lines(plain), plain);
        }
        let e = crate::Error::invalid(format!("node `{name}`")).context("x\nerror: y").hint("run \x1b[8m").to_string();
        assert!(
            !e.contains(['\x1b', '\r', '\x07', '\u{9b}', '\u{202e}']) && e.starts_with("x\\nerror: y: node"),
            "{e}"
        );
        // Its lines are ours alone.
        assert_eq!(e.lines().count(), 2, "{e}");
        let told =
            crate::Error::of_text(crate::Kind::Usage, "not TOML: a\n  |\n1 | b\n").hint("c").hint_lines(["d\ne"]);
        assert_eq!(told.to_string(), "not TOML: a\n    |\n  1 | b\n  help: c\n    d\\ne");
    }
}
