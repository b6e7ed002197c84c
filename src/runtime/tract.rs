//! tract: pure Rust, no shared library. It wants every shape known, so a plan is made for each combination of input shapes
//! and kept.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use half::f16;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::optim::Optimizer;

use super::{Engine, Source, ValueInfo, arrange, model_values};
use crate::error::{Context as _, Error, Result};
use crate::tensor::{DType, Element, HostTensor};

/// Plans kept for different input shapes; the oldest goes first.
const PLANS: usize = 8;

/// A network in tract.
pub struct TractEngine {
    model: InferenceModel,
    inputs: Vec<ValueInfo>,
    outputs: Vec<ValueInfo>,
    plans: HashMap<Vec<Vec<usize>>, Arc<TypedRunnableModel>>,
    order: Vec<Vec<Vec<usize>>>,
}

/// tract's version, as locked in Cargo.toml.
pub const VERSION: &str = "0.23.9";

fn failed(e: impl std::fmt::Display) -> Error {
    Error::backend(format!("tract: {e}"))
}

/// Runs code of tract, which indexes and unwraps here and there on models that it did not expect.
fn guarded<T>(what: impl FnOnce() -> TractResult<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(what)) {
        // (What follows a first line is the graph in tract's own words, without end.)
        Ok(result) => result.map_err(|e| failed(format!("{e:#}").lines().next().unwrap_or_default())),
        Err(_) => Err(failed("it gave up on this network (panic)").hint("use --engine ort")),
    }
}

impl TractEngine {
    pub(crate) fn open(source: Source<'_>) -> Result<Self> {
        let read;
        let (bytes, folder) = match source {
            Source::File(path) => {
                read = crate::files::map(path)?;
                (&read[..], path.parent())
            }
            Source::Bytes { bytes, folder } => (bytes, folder),
        };
        let (inputs, outputs) = model_values(&super::student::decode(bytes)?)?;
        let model = guarded(|| {
            let framework = tract_onnx::onnx().with_ignore_value_info(true).with_ignore_output_shapes(true);
            let proto = framework.proto_model_for_read(&mut &*bytes)?;
            Ok(framework.parse(&proto, folder.and_then(|f| f.to_str()))?.model)
        })?;
        Ok(Self { model, inputs, outputs, plans: HashMap::new(), order: Vec::new() })
    }

    fn plan(&mut self, shapes: Vec<Vec<usize>>) -> Result<Arc<TypedRunnableModel>> {
        if let Some(plan) = self.plans.get(&shapes) {
            return Ok(plan.clone());
        }
        let plan = guarded(|| {
            let mut model = self.model.clone();
            let outlets = model.input_outlets()?.to_vec();
            for (k, outlet) in outlets.into_iter().enumerate() {
                let name = model.node(outlet.node).name.clone();
                let found = self.inputs.iter().position(|i| i.name == name);
                let found = found.ok_or_else(|| TractError::msg(format!("unexpected input `{name}`")))?;
                let dtype = datum_type(self.inputs[found].dtype).map_err(TractError::msg)?;
                model.set_input_fact(k, InferenceFact::dt_shape(dtype, &shapes[found]))?;
            }
            runnable(&model.into_typed()?)
        })?;
        if self.order.len() == PLANS {
            self.plans.remove(&self.order.remove(0));
        }
        self.order.push(shapes.clone());
        self.plans.insert(shapes, plan.clone());
        Ok(plan)
    }
}

/// The model as a plan. tract's rewrites fail on some graphs that it runs well without them: of a product with a joined input it makes
/// a product for each part, and then loses the rows of a part that was only expanded (a feature of a whole cloud of points,
/// joined to each point's own). So what fails is tried again without that rewrite, and at last as it stands, which is slower.
fn runnable(model: &TypedModel) -> TractResult<Arc<TypedRunnableModel>> {
    fn whole(model: TypedModel) -> TractResult<Arc<TypedRunnableModel>> {
        model.into_optimized()?.into_runnable()
    }
    fn spared(mut model: TypedModel) -> TractResult<Arc<TypedRunnableModel>> {
        let mut passes = Optimizer::declutter();
        passes.passes.retain(|pass| !format!("{pass:?}").starts_with("ConcatThenEinsum"));
        passes.optimize(&mut model)?;
        model.optimize()?;
        model.into_runnable()
    }
    fn plain(model: TypedModel) -> TractResult<Arc<TypedRunnableModel>> {
        model.into_runnable()
    }
    // (A rewrite may also panic.)
    let tried = |make: fn(TypedModel) -> TractResult<Arc<TypedRunnableModel>>| {
        catch_unwind(AssertUnwindSafe(|| make(model.clone())))
            .unwrap_or_else(|_| Err(TractError::msg("it gave up on this network (panic)")))
    };
    tried(whole).or_else(|first| tried(spared).or_else(|_| tried(plain)).map_err(|_| first))
}

fn datum_type(dtype: DType) -> Result<DatumType> {
    Ok(match dtype {
        DType::F32 => DatumType::F32,
        DType::F64 => DatumType::F64,
        DType::F16 => DatumType::F16,
        DType::I8 => DatumType::I8,
        DType::I16 => DatumType::I16,
        DType::I32 => DatumType::I32,
        DType::I64 => DatumType::I64,
        DType::U8 => DatumType::U8,
        DType::U16 => DatumType::U16,
        DType::U32 => DatumType::U32,
        DType::U64 => DatumType::U64,
        DType::Bool => DatumType::Bool,
        DType::BF16 => return Err(Error::unsupported("tract has no bf16").hint("use --engine ort")),
    })
}

macro_rules! by_dtype {
    ($dtype:expr, $go:ident!($($arg:expr),*)) => {
        match $dtype {
            DType::F32 => $go!(f32, $($arg),*),
            DType::F64 => $go!(f64, $($arg),*),
            DType::F16 => $go!(f16, $($arg),*),
            DType::I8 => $go!(i8, $($arg),*),
            DType::I16 => $go!(i16, $($arg),*),
            DType::I32 => $go!(i32, $($arg),*),
            DType::I64 => $go!(i64, $($arg),*),
            DType::U8 => $go!(u8, $($arg),*),
            DType::U16 => $go!(u16, $($arg),*),
            DType::U32 => $go!(u32, $($arg),*),
            DType::U64 => $go!(u64, $($arg),*),
            DType::Bool => $go!(bool, $($arg),*),
            DType::BF16 => return Err(Error::unsupported("tract has no bf16").hint("use --engine ort")),
        }
    };
}

fn to_value(tensor: &HostTensor) -> Result<TValue> {
    macro_rules! go {
        ($t:ty, $x:expr) => {
            Tensor::from_shape($x.shape(), &$x.values::<$t>()?)
        };
    }
    let made = by_dtype!(tensor.dtype(), go!(tensor));
    Ok(made.map_err(failed)?.into_tvalue())
}

fn from_value(value: &TValue, dtype: DType) -> Result<HostTensor> {
    fn convert<T: Element + Datum>(value: &Tensor) -> TractResult<HostTensor> {
        let cast = value.cast_to::<T>()?;
        let plain = cast.try_as_plain_ram()?;
        HostTensor::new(value.shape(), plain.as_slice::<T>()?).map_err(TractError::msg)
    }
    macro_rules! go {
        ($t:ty, $x:expr) => {
            convert::<$t>($x)
        };
    }
    let tensor: &Tensor = value;
    by_dtype!(dtype, go!(tensor)).map_err(failed)
}

impl Engine for TractEngine {
    fn name(&self) -> String {
        format!("tract {VERSION} (CPU)")
    }
    fn inputs(&self) -> &[ValueInfo] {
        &self.inputs
    }
    fn outputs(&self) -> &[ValueInfo] {
        &self.outputs
    }
    fn run(&mut self, inputs: &[(&str, &HostTensor)]) -> Result<Vec<(String, HostTensor)>> {
        let tensors = arrange(&self.inputs, inputs)?;
        let plan = self.plan(tensors.iter().map(|t| t.shape().to_vec()).collect())?;
        let mut values: TVec<TValue> = tvec!();
        // The plan may list its inputs in another order than the file.
        for outlet in guarded(|| Ok(plan.model().input_outlets()?.to_vec()))? {
            let name = &plan.model().node(outlet.node).name;
            let k = self.inputs.iter().position(|i| i.name == *name);
            values.push(to_value(tensors[k.ok_or_else(|| failed(format!("unexpected input `{name}`")))?])?);
        }
        let outputs = guarded(|| plan.run(values))?;
        self.outputs
            .iter()
            .zip(outputs.iter())
            .map(|(info, value)| Ok((info.name.clone(), from_value(value, info.dtype).context(&info.name)?)))
            .collect()
    }
}
