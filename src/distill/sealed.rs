//! JSON texts that hold their own hash, so that a byte that changed on the disk is found.

use sha2::{Digest, Sha256};

/// SHA-256, as hexadecimal digits.
fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn field(key: &str, hash: &str) -> String {
    format!("\"{key}\": \"{hash}\"")
}

/// The pretty-printed text with the SHA-256 of itself in the place of the empty text that `key` has in it.
pub(super) fn seal(text: &str, key: &str) -> String {
    text.replace(&field(key, ""), &field(key, &hex(text.as_bytes())))
}

/// Whether the text that says of itself to have this hash still has it.
pub(super) fn is_whole(text: &[u8], key: &str, hash: &str) -> bool {
    hex(String::from_utf8_lossy(text).replace(&field(key, hash), &field(key, "")).as_bytes()) == hash
}
