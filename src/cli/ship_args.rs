//! Options of `export` that decide what the file that ships looks like, and how its report is shown.

use std::path::PathBuf;

use clap::Args;

use crate::error::{Error, Result};
use crate::export::{Precision, ShipOptions, ShipReport};
use crate::passes::fuse::Fuse;
use crate::shown::{say, tell};

/// `--precision`, `--batch`, `--opset` and what is appended.
#[derive(Debug, Clone, Args)]
pub struct ShipArgs {
    /// f32; fp16 or bf16 where it holds (calibrated, the rest in f32); int8 weights; int8-dynamic: arithmetic in 8 bits too.
    #[arg(long, value_enum, default_value = "f32")]
    pub precision: Precision,
    /// Nodes that stay in f32 with fp16 and bf16, by name, as in '*/attn/*'.
    #[arg(long, value_name = "GLOB")]
    pub keep_f32: Vec<String>,
    /// How far int8 and int8-dynamic may move a value of the sample [default: 0.1].
    #[arg(long, value_name = "LIMIT")]
    pub int8_limit: Option<f64>,
    /// Images of the noise that other precisions than f32 are calibrated on [default: 16].
    #[arg(long, value_name = "IMAGES")]
    pub calibrate: Option<usize>,
    /// Fix the batch at this number; `dynamic` keeps it free.
    #[arg(long, default_value = "dynamic")]
    pub batch: String,
    /// Operator set version, 13 to 25; the teacher's where absent.
    #[arg(long)]
    pub opset: Option<i64>,
    /// Leave constants and shape arithmetic as the exporter wrote them.
    #[arg(long)]
    pub no_optimise: bool,
    /// Write chains as the operators that they are, where the operator set has them: `auto` LayerNormalization and Gelu, `all`
    /// GroupNormalization, RMSNormalization, Attention and Gelu by tanh too, which some runtimes lack or run slower.
    #[arg(long, alias = "raise", value_enum, default_value = "auto")]
    pub fuse: Fuse,
    /// Leave negative steps, sequences and auto_pad as they are.
    #[arg(long)]
    pub no_portable: bool,
    /// Add an output `image`: u8 [batch, H, W, C].
    #[arg(long)]
    pub image: bool,
    /// ONNX decoder that turns the latents into images.
    #[arg(long, value_name = "FILE.onnx")]
    pub decoder: Option<PathBuf>,
    /// Value range of the decoder's output [default: -1,1].
    #[arg(long, value_name = "LOW,HIGH", allow_hyphen_values = true, requires = "decoder")]
    pub decoder_range: Option<String>,
    /// Write the graph before the first pass and after each into this folder, to find the one that breaks something.
    #[arg(long, value_name = "DIR")]
    pub dump_passes: Option<PathBuf>,
    /// Weights in a file of their own (<out>.data), which above 2 GB they are anyway.
    #[arg(long)]
    pub external_data: bool,
}

impl ShipArgs {
    /// As the library wants them.
    pub fn options(&self) -> Result<ShipOptions> {
        let bad = || Error::usage(format!("--batch {}: expected a number or `dynamic`", self.batch));
        let batch = match self.batch.as_str() {
            "dynamic" => None,
            n => Some(n.parse::<usize>().map_err(|_| bad())?),
        };
        let range = self.decoder_range.as_deref().unwrap_or("-1,1");
        let numbers: Option<Vec<f64>> = range.split(',').map(|p| p.trim().parse().ok()).collect();
        let range = match numbers.as_deref() {
            Some([low, high]) if low < high => [*low, *high],
            _ => return Err(Error::usage(format!("--decoder-range {range}: expected LOW,HIGH"))),
        };
        let int8_limit = self.int8_limit.unwrap_or(0.1);
        if !(int8_limit > 0.0) {
            return Err(Error::usage(format!("--int8-limit {int8_limit}: expected a number above 0")));
        }
        if self.calibrate == Some(0) {
            return Err(Error::usage("--calibrate 0: expected 1 or more"));
        }
        let (half, int8) = (
            matches!(self.precision, Precision::Fp16 | Precision::Bf16),
            matches!(self.precision, Precision::Int8 | Precision::Int8Dynamic),
        );
        let idle = [
            ("--keep-f32", !self.keep_f32.is_empty() && !half, "--precision fp16 or bf16"),
            ("--int8-limit", self.int8_limit.is_some() && !int8, "--precision int8 or int8-dynamic"),
            ("--calibrate", self.calibrate.is_some() && !half && !int8, "another --precision than f32"),
        ];
        if let Some((name, _, with)) = idle.iter().find(|i| i.1) {
            return Err(Error::usage(format!("{name} does nothing here: it goes with {with}")));
        }
        if self.no_optimise && self.fuse == Fuse::All {
            return Err(Error::usage("--fuse all and --no-optimise exclude one another"));
        }
        Ok(ShipOptions {
            precision: self.precision,
            keep_f32: self.keep_f32.clone(),
            int8_limit,
            calibration: self.calibrate.unwrap_or(16),
            batch,
            opset: self.opset,
            optimise: !self.no_optimise,
            fuse: self.fuse,
            portable: !self.no_portable,
            image: self.image,
            decoder: self.decoder.clone().map(|d| (d, range)),
            dump_passes: self.dump_passes.clone(),
        })
    }

    /// Whether anything beside the defaults is asked for.
    pub fn asks(&self) -> bool {
        self.precision != Precision::F32
            || self.batch != "dynamic"
            || self.opset.is_some()
            || self.no_optimise
            || self.no_portable
            || self.fuse != Fuse::Auto
            || self.image
            || self.decoder.is_some()
    }
}

/// Weights above this size leave for a file of their own; with `--external-data` all but the smallest do.
pub fn external_limit(asked: bool) -> usize {
    if asked { 0 } else { crate::graph::save::EXTERNAL_ABOVE }
}

/// Nodes that share a reason, in the order in which the reasons come.
fn by_reason<'a>(all: impl Iterator<Item = (String, &'a str)>) -> Vec<(String, Vec<&'a str>)> {
    let mut reasons: Vec<(String, Vec<&str>)> = Vec::new();
    for (reason, node) in all {
        match reasons.iter_mut().find(|(r, _)| *r == reason) {
            Some((_, nodes)) => nodes.push(node),
            None => reasons.push((reason, vec![node])),
        }
    }
    reasons
}

/// What was done, in lines.
pub fn show(report: &ShipReport) {
    say!(
        "  precision  {}, opset {}, {:.2} MiB of weights",
        report.precision.name(),
        report.opset,
        report.weight_bytes as f64 / 1048576.0
    );
    if let Some(s) = &report.simplified {
        let (before, after) = (s.nodes_before, s.nodes_after);
        say!(
            "  graph      {before} nodes -> {after} ({} values folded, {} of them a row for all images; {} batch sizes left to \
             Reshape)",
            s.folded + s.rows,
            s.rows,
            s.reshapes
        );
    }
    if let Some(r) = &report.fused {
        for (operator, n) in &r.operators {
            say!("  fused     {n} {operator}");
        }
        for (reason, nodes) in by_reason(r.kept.iter().map(|c| (format!("{}: {}", c.operator, c.reason), &*c.node))) {
            say!("    chain    {reason} ({} nodes, e.g. {})", nodes.len(), nodes[0]);
        }
    }
    for line in &report.portable {
        say!("  portable   {line}");
    }
    for (node, what) in &report.not_portable {
        say!("  not portable: {node}: {what}");
    }
    if let Some(h) = &report.half {
        say!(
            "  {} nodes in 16 bits, {} in f32; checked: {}, off by {:.1e}",
            h.nodes,
            h.kept.len(),
            h.checked,
            h.max_abs
        );
        for (reason, nodes) in by_reason(h.kept.iter().map(|k| (format!("{}: {}", k.operator, k.reason), &*k.node))) {
            say!("    f32      {reason} ({} nodes, e.g. {})", nodes.len(), nodes[0]);
        }
    }
    if let Some(q) = &report.int8 {
        say!("  {} weights in 8 bits, {} in f32, off by {:.1e}", q.tensors, q.kept.len(), q.max_abs);
        for (name, reason) in &q.kept {
            say!("    f32      {name}: {reason}");
        }
    }
    if let Some(d) = report.max_abs {
        say!("  against the student as distilled, on other noise: {d:.1e}");
    }
    for w in &report.warnings {
        tell!("warning: {w}");
    }
}
