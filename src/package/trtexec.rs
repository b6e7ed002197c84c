//! The command that builds a TensorRT engine of a student.

use super::{Packed, TOKENS};

/// `trtexec.sh`.
pub(super) fn script(p: &Packed, file: &str) -> String {
    let mut options = vec![format!("--onnx={file}"), format!("--saveEngine={}.plan", p.name)];
    if p.batch.is_none() {
        let shapes = |batch: usize| -> String {
            let one = |input: &crate::runtime::ValueInfo| {
                let row = Packed::row(input, TOKENS as i64).into_iter().map(|n| format!("x{n}"));
                format!("{}:{batch}{}", input.name, row.collect::<String>())
            };
            p.inputs.iter().map(one).collect::<Vec<_>>().join(",")
        };
        let usual = p.max_batch.div_ceil(2);
        for (name, batch) in [("min", 1), ("opt", usual), ("max", p.max_batch)] {
            options.push(format!("--{name}Shapes={}", shapes(batch)));
        }
    }
    // The file says which nodes are in 16 bits; TensorRT is not to choose.
    let note = if p.f16() {
        options.push("--stronglyTyped".to_owned());
        "# The file's own types are kept (16 bits where it has them)."
    } else {
        options.push("--noTF32".to_owned());
        "# In f32, without TF32: leave --noTF32 out for speed, --fp16 lets TensorRT choose (then compare samples)."
    };
    let words: Vec<String> = options.iter().map(|o| word(o)).collect();
    format!(
        "#!/bin/sh\n# Builds an engine for the GPU of the machine that it runs on (TensorRT 10).\n{note}\nset -eu\n\
         cd \"$(dirname \"$0\")\"\nexec trtexec \\\n  {} \"$@\"\n",
        words.join(" \\\n  ")
    )
}

/// A word for the shell.
fn word(text: &str) -> String {
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=:,".contains(c));
    if plain { text.to_owned() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}
