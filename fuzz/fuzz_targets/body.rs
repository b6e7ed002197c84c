//! Requests for samples through the reader of `serve`: the first line is the query, the second the Accept header, the rest the body.
#![no_main]

mod text;

use bytes::Bytes;
use disback::runtime::student::{StudentInfo, decode};
use disback::serve::read_request;
#[allow(unused_imports, reason = "of the file below")]
use disback::{onnx, tensor};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

#[path = "../../src/runtime/testing.rs"]
#[allow(dead_code, reason = "of several students, one is asked")]
mod testing;

/// Bytes of a body, and images of a request.
const MOST: (usize, usize) = (1 << 20, 64);

thread_local! {
    static STUDENTS: Vec<StudentInfo> = {
        let embedded = [
            ("disback.conditions.text.kind", "embedding"),
            ("disback.conditions.text.shape", "[3]"),
            ("disback.range", "[-1.0, 1.0]"),
        ];
        let files = [testing::student("batch"), testing::halved(&[1, 2, 2], &embedded), testing::halved(&[5], &[])];
        let info = |bytes: Vec<u8>| StudentInfo::from_model(&decode(&bytes).ok()?).ok();
        files.into_iter().filter_map(info).collect()
    };
}

fuzz_target!(|data: &[u8]| {
    let mut lines = data.splitn(3, |b| *b == b'\n');
    let mut line = || String::from_utf8_lossy(lines.next().unwrap_or_default()).into_owned();
    let (query, accept) = (line(), line());
    let body = Bytes::copy_from_slice(lines.next().unwrap_or_default());
    STUDENTS.with(|students| {
        assert!(students.len() >= 2, "students to ask");
        for info in students {
            if let Ok((count, held)) = read_request(info, MOST, &query, &accept, &body) {
                assert!((1..=MOST.1).contains(&count), "{count} images");
                assert!(held < 16 << 20, "{held} bytes");
            }
        }
    });
});
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { text::mutate(data, size, max_size, seed) });
