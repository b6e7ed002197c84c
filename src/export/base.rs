//! What a student's file is made of: the teacher's graph with the student's weights, in f32 and in operators that ONNX defines.
//!
//! The weights were trained in f32, whatever the teacher's file stores; `export --precision` makes 16 bits of them again,
//! calibrated. Operators that ONNX Runtime's optimiser wrote for one kind of device would tie the student to it.

use crate::error::Result;
use crate::onnx::ModelProto;
use crate::passes::contrib;
use crate::passes::precision::upcast;
use crate::torch::{Network, ParamSet};

/// The network's file with these weights, widened and plain.
pub(super) fn base(net: &Network, params: &ParamSet) -> Result<ModelProto> {
    let mut model = net.with_wide_weights(params)?;
    if net.shared().widened {
        upcast::widen(&mut model, &net.shared().model)?;
    }
    contrib::plain(&mut model);
    Ok(model)
}
