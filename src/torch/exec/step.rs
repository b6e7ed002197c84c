//! One step of a plan, and what a list of steps says about its values.

use std::collections::HashSet;

use tch::Device;

use crate::error::{Context, Error, Result};
use crate::graph::{Port, ValueId};
use crate::torch::exec::kernel::{Kernel, Value};

/// One operator call of a plan.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) kernel: Kernel,
    pub(crate) inputs: Vec<Option<ValueId>>,
    pub(crate) outputs: Vec<Option<ValueId>>,
    pub(crate) label: String,
}

/// Calls one operator on the values so far.
pub(crate) fn run_step(
    step: &Step,
    values: &mut [Option<Value>],
    device: Device,
    observe: &mut dyn FnMut(ValueId, &Value),
) -> Result<()> {
    let args: Vec<Option<&Value>> = step.inputs.iter().map(|v| v.and_then(|v| values[v].as_ref())).collect();
    let out = step.kernel.call(args, device).with_context(|| step.label.clone())?;
    let asked = step.outputs.iter().rposition(Option::is_some).map_or(0, |i| i + 1);
    if out.len() < asked {
        return Err(Error::unsupported("an optional output is asked for that is not implemented").context(&*step.label));
    }
    for (id, v) in step.outputs.iter().zip(out) {
        if let Some(id) = id {
            observe(*id, &v);
            values[*id] = Some(v);
        }
    }
    Ok(())
}

/// Values whose elements an operator reads on the host, directly or through other operators, and those behind `seeds`.
pub(crate) fn wanted_on_host(steps: &[Step], seeds: impl IntoIterator<Item = ValueId>) -> HashSet<ValueId> {
    let mut wanted: HashSet<ValueId> = seeds.into_iter().collect();
    for step in steps.iter().rev() {
        for &slot in &step.kernel.host_slots {
            wanted.extend(step.inputs.get(slot).copied().flatten());
        }
        let makes_wanted = step.outputs.iter().flatten().any(|v| wanted.contains(v));
        if makes_wanted && !step.kernel.shape_only {
            wanted.extend(step.inputs.iter().flatten());
        }
    }
    wanted
}

/// Values that no later step and no output reads, after each step.
pub(crate) fn done_after(steps: &[Step], outputs: &[Port]) -> Vec<Vec<ValueId>> {
    let mut seen: HashSet<ValueId> = outputs.iter().map(|p| p.value).collect();
    let mut out = vec![Vec::new(); steps.len()];
    for (i, step) in steps.iter().enumerate().rev() {
        for &v in step.inputs.iter().chain(&step.outputs).flatten() {
            if seen.insert(v) {
                out[i].push(v);
            }
        }
    }
    out
}
