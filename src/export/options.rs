//! What to make of a student, and what was made of it.

use std::path::PathBuf;

use serde::Serialize;

use crate::graph::edit;
use crate::onnx::ModelProto;
use crate::passes::fuse::{Fuse, Written};
use crate::passes::precision::half::Converted;
use crate::passes::precision::int8::QuantisationReport;
use crate::passes::simplify::Simplified;

/// Element type of the student's arithmetic or weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// As distilled.
    #[default]
    F32,
    /// f16 where it holds, f32 elsewhere.
    Fp16,
    /// bf16 where ONNX has it, f32 elsewhere.
    Bf16,
    /// Weights in 8 bits, arithmetic in f32.
    Int8,
    /// Weights in 8 bits, and products and convolutions computed in them where that holds.
    #[serde(rename = "int8-dynamic")]
    Int8Dynamic,
}

impl Precision {
    /// The name on the command line and in the metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int8Dynamic => "int8-dynamic",
        }
    }
}

/// How a student is written to its file.
#[derive(Debug, Clone)]
pub struct ShipOptions {
    /// Element type of the shipped file's weights or arithmetic.
    pub precision: Precision,
    /// Globs of node names that stay in f32.
    pub keep_f32: Vec<String>,
    /// Largest change of a value of the sample that quantisation to 8 bits may cause.
    pub int8_limit: f64,
    /// Number of images of noise that precisions other than f32 are calibrated on.
    pub calibration: usize,
    /// Number of images that the batch is fixed at; absent: the batch stays as it is.
    pub batch: Option<usize>,
    /// Operator set that the file is converted to; absent: it keeps that of the student.
    pub opset: Option<i64>,
    /// Whether constants and shape arithmetic are folded.
    pub optimise: bool,
    /// Which chains are written as the operators that they are, where the graph is optimised.
    pub fuse: Fuse,
    /// Whether operators and forms that several runtimes lack are written in plainer ones.
    pub portable: bool,
    /// Whether the output `image` is added: u8, `[batch, H, W, C]`.
    pub image: bool,
    /// ONNX file that turns latents into images, and its output's range; absent: `sample` stays as it is.
    pub decoder: Option<(PathBuf, [f64; 2])>,
    /// Folder that gets the graph before the first pass and after each; absent: nothing is written.
    pub dump_passes: Option<PathBuf>,
}

impl Default for ShipOptions {
    fn default() -> Self {
        Self {
            precision: Precision::F32,
            keep_f32: Vec::new(),
            int8_limit: 0.1,
            calibration: 16,
            batch: None,
            opset: None,
            optimise: true,
            fuse: Fuse::Auto,
            portable: true,
            image: false,
            decoder: None,
            dump_passes: None,
        }
    }
}

/// What writing a student did: printed, and part of the JSON document of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct ShipReport {
    /// The precision that was asked for.
    pub precision: Precision,
    /// Operator set of the file that was written.
    pub opset: i64,
    /// What simplifying did; absent where the graph was not optimised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub simplified: Option<Simplified>,
    /// Fused operators that were written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fused: Option<Written>,
    /// Nodes that were written in plainer operators, one line each.
    pub portable: Vec<String>,
    /// Nodes that no plainer form was found for, each with the operator or form that some runtimes lack.
    pub not_portable: Vec<(String, String)>,
    /// The conversion to 16 bits; absent for other precisions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub half: Option<Converted>,
    /// The quantisation to 8 bits; absent for other precisions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub int8: Option<QuantisationReport>,
    /// Largest difference of the sample to the student that came in, on other noise than the calibration's; in 16 bits also
    /// on that, with every value rounded. `None`: not measured, because ONNX Runtime was not found.
    pub max_abs: Option<f64>,
    /// Bytes of all weights in the file.
    pub weight_bytes: usize,
    /// What the user should know about the file, one sentence each.
    pub warnings: Vec<String>,
}

impl ShipReport {
    /// Nothing done yet.
    pub(super) fn new(options: &ShipOptions, model: &ModelProto) -> Self {
        Self {
            precision: options.precision,
            opset: edit::opset(model),
            simplified: None,
            fused: None,
            portable: Vec::new(),
            not_portable: Vec::new(),
            half: None,
            int8: None,
            max_abs: None,
            weight_bytes: 0,
            warnings: Vec::new(),
        }
    }
}
