//! Changes to texts of several parts that keep them texts: numbers, words and lines are put in place of others, so that most inputs get
//! past a parser. The rest is libFuzzer's own.

use libfuzzer_sys::fuzzer_mutate;

/// Parts of an input are parted by this line.
#[allow(dead_code, reason = "not every target has parts")]
pub const PARTED: &str = "\n===\n";

const WORDS: &[&str] = &[
    "0",
    "1",
    "-1",
    "0.5",
    "1e308",
    "-1e308",
    "1.7976931348623157e308",
    "1e-320",
    "-0.0",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "4611686018427387904",
    "1e400",
    "null",
    "true",
    "\"\"",
    "\"nan\"",
    "[]",
    "{}",
    "[1e308,-1e308]",
    "[0,0]",
    "nan",
    "inf",
    "-inf",
    "\"\\u0000\"",
    "\"\\u001b[2J\"",
    "65536",
];

/// xorshift
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % n.max(1) as u64) as usize
    }
}

/// Where numbers, words and strings stand.
fn tokens(text: &[u8]) -> Vec<(usize, usize)> {
    let part = |b: u8| b.is_ascii_alphanumeric() || b"._+-\"\\".contains(&b);
    let (mut found, mut at) = (Vec::new(), 0);
    while at < text.len() {
        let end = at + text[at..].iter().take_while(|b| part(**b)).count();
        if end > at {
            found.push((at, end));
        }
        at = end + 1;
    }
    found
}

/// One change.
fn step(text: &mut Vec<u8>, dice: &mut Dice) {
    let tokens = tokens(text);
    let Some(&(start, end)) = tokens.get(dice.below(tokens.len())) else { return };
    match dice.below(5) {
        0..3 => drop(text.splice(start..end, WORDS[dice.below(WORDS.len())].bytes())),
        // One of the text's own in its place.
        3 => {
            let (from, to) = tokens[dice.below(tokens.len())];
            let other = text[from..to].to_vec();
            text.splice(start..end, other);
        }
        // A line once more, or taken away.
        _ => {
            let begin = text[..start].iter().rposition(|b| *b == b'\n').map_or(0, |k| k + 1);
            let over = text[start..].iter().position(|b| *b == b'\n').map_or(text.len(), |k| start + k + 1);
            let line = text[begin..over].to_vec();
            match dice.below(2) {
                0 => drop(text.splice(begin..begin, line)),
                _ => drop(text.drain(begin..over)),
            }
        }
    }
}

/// libFuzzer's custom mutator.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let mut dice = Dice((u64::from(seed) << 17 | 0x9e37_79b9) ^ 0x2545_f491_4f6c_dd1d);
    if size == 0 || dice.below(4) == 0 {
        return fuzzer_mutate(data, size, max_size);
    }
    let mut text = data[..size].to_vec();
    for _ in 0..=dice.below(4) {
        step(&mut text, &mut dice);
    }
    if text.is_empty() || text.len() > max_size {
        return fuzzer_mutate(data, size, max_size);
    }
    data[..text.len()].copy_from_slice(&text);
    text.len()
}
