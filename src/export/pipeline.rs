//! The passes that a student goes through on its way to the file that ships, in their order.

use crate::error::Result;
use crate::export::attach;
use crate::export::options::{Precision, ShipOptions, ShipReport};
use crate::graph::edit;
use crate::onnx::ModelProto;
use crate::passes::evaluate::{self, Inputs};
use crate::passes::fuse;
use crate::passes::precision::{half, int8, int8_dynamic};
use crate::passes::simplify::{remove_identities, simplify};
use crate::passes::{Pass, opset, portable};
use crate::runtime::cast_transpose;
use crate::tensor::DType;

/// What the passes share.
pub(super) struct Shipping<'a> {
    pub options: &'a ShipOptions,
    /// How the weights of the student that came in are stored: `f32`, `fp16`...
    pub stored: String,
    /// Inputs of several batch sizes; none where there is no engine to run them, or the student has shipped before.
    pub probes: Option<Vec<Inputs>>,
    pub report: ShipReport,
}

impl Shipping<'_> {
    fn optimises(&self) -> bool {
        self.probes.is_some() && self.options.optimise
    }
    fn ports(&self) -> bool {
        self.probes.is_some() && self.options.portable
    }
    fn probes(&self) -> &[Inputs] {
        self.probes.as_deref().unwrap_or_default()
    }
}

type Step = dyn for<'a> Pass<ModelProto, Shipping<'a>>;

/// In the order in which they run. Everything up to `precision` works on the graph as distilled; what follows makes its files
/// open everywhere.
pub(super) const PASSES: [&Step; 9] =
    [&Simplify, &Portable, &Identities, &GemmInF16, &Opset, &Fuse, &NotPortable, &ToPrecision, &CastTranspose];
/// Appended at the end, where it is asked for.
pub(super) const IMAGE: &Step = &Image;

/// A pass without fields.
macro_rules! pass {
    ($(#[$text:meta])* $pass:ident, $name:literal, keeps: $keeps:expr, applies: $applies:expr, run: $run:expr) => {
        $(#[$text])*
        struct $pass;
        impl<'a> Pass<ModelProto, Shipping<'a>> for $pass {
            fn name(&self) -> &'static str {
                $name
            }
            fn applies(&self, model: &ModelProto, shared: &Shipping<'a>) -> bool {
                let applies: fn(&ModelProto, &Shipping<'_>) -> bool = $applies;
                applies(model, shared)
            }
            fn run(&self, model: &mut ModelProto, shared: &mut Shipping<'a>) -> Result<()> {
                let run: fn(&mut ModelProto, &mut Shipping<'_>) -> Result<()> = $run;
                run(model, shared)
            }
            fn keeps_values(&self) -> bool {
                $keeps
            }
        }
    };
}

pass!(
    /// Constants and shape arithmetic folded, what is the same for every image computed once.
    Simplify, "simplify", keeps: true,
    applies: |_, s| s.optimises(),
    run: |model, s| {
        s.report.simplified = Some(simplify(model, s.probes())?);
        Ok(())
    }
);

pass!(
    /// Negative steps, sequences, auto_pad and what else runtimes lack, in plainer operators.
    Portable, "portable", keeps: true,
    applies: |_, s| s.ports(),
    run: |model, s| {
        s.report.portable = portable::portable(model, s.probes())?;
        Ok(())
    }
);

pass!(
    /// What the plainer operators left to be passed through.
    Identities, "identities", keeps: true,
    applies: |_, s| s.ports() && s.options.optimise,
    run: |model, s| {
        let Some(graph) = model.graph.as_mut() else { return Ok(()) };
        remove_identities(graph);
        if let Some(simplified) = s.report.simplified.as_mut() {
            simplified.nodes_after = graph.node.len();
        }
        Ok(())
    }
);

pass!(
    /// Gemm of a file in f16 as MatMul and Add, which tract takes.
    GemmInF16, "gemm-in-f16", keeps: true,
    applies: |_, s| s.ports() && s.stored == "fp16",
    run: |model, s| {
        if half::gemm_as_matmul(model)? > 0 {
            s.report.portable.push("Gemm in f16 is a MatMul and an Add now".into());
        }
        Ok(())
    }
);

pass!(
    /// Another operator set version.
    Opset, "opset", keeps: true,
    applies: |model, s| s.options.opset.is_some_and(|wanted| wanted != edit::opset(model)),
    run: |model, s| s.options.opset.map_or(Ok(()), |wanted| opset::convert(model, wanted))
);

pass!(
    /// Chains written as the operators that they are.
    Fuse, "fuse", keeps: true,
    applies: |_, s| s.optimises() && s.options.fuse != fuse::Fuse::None,
    run: |model, s| {
        s.report.fused = Some(fuse::write(model, s.options.fuse, s.probes())?);
        Ok(())
    }
);

pass!(
    /// Names what no portable form was found for. Changes nothing.
    NotPortable, "not-portable", keeps: false,
    applies: |_, s| s.options.portable,
    run: |model, s| {
        s.report.not_portable = model.graph.as_ref().map_or_else(Vec::new, portable::left_over);
        Ok(())
    }
);

pass!(
    /// Fewer bits, calibrated on noise.
    ToPrecision, "precision", keeps: false,
    applies: |_, s| s.options.precision != Precision::F32,
    run: |model, s| {
        let options = s.options;
        let rows = 4.min(options.calibration.max(1));
        let runs = options.calibration.max(1).div_ceil(rows) as u64;
        let inputs: Vec<Inputs> =
            (0..runs).map(|k| evaluate::student_inputs(model, 1000 + k, rows)).collect::<Result<_>>()?;
        let report = &mut s.report;
        match options.precision {
            Precision::F32 => {}
            Precision::Fp16 => report.half = Some(half::to_half(model, DType::F16, &options.keep_f32, &inputs)?),
            Precision::Bf16 => report.half = Some(half::to_half(model, DType::BF16, &options.keep_f32, &inputs)?),
            Precision::Int8 => report.int8 = Some(int8::quantise(model, options.int8_limit, &inputs)?),
            Precision::Int8Dynamic => {
                report.int8 = Some(int8_dynamic::quantise(model, options.int8_limit, &inputs)?);
                report.warnings.push(
                    "activations are quantised with one scale for a whole batch: an image changes a little with those beside it"
                        .into(),
                );
            }
        }
        Ok(())
    }
);

pass!(
    /// The file must open in ONNX Runtime, whose optimiser is on by default and fails on some casts between transposes. The whole
    /// file is checked after it.
    CastTranspose, "cast-transpose", keeps: false,
    applies: |_, _| true,
    run: |model, s| {
        let parted = model.graph.as_mut().map_or(0, cast_transpose::part);
        if parted > 0 {
            s.report.portable.push(format!(
                "{parted} Reshapes to the same shape between Transpose and MatMul: ONNX Runtime's MatmulTransposeFusion fails without"
            ));
        }
        Ok(())
    }
);

pass!(
    /// An output of 8-bit images.
    Image, "image", keeps: false,
    applies: |_, s| s.options.image,
    run: |model, _| attach::image(model)
);
