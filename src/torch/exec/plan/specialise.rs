//! What a plan settles when it first meets an input signature.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use tch::Device;

use crate::error::Result;
use crate::graph::ValueId;
use crate::torch::exec::kernel::Value;
use crate::torch::exec::plan::{Plan, Signature};
use crate::torch::exec::segments;
use crate::torch::exec::segments::{Segment, Sizes};
use crate::torch::exec::step::run_step;

/// Specialised plans that are kept at a time: batch sizes, last batches, evaluation.
const MOST_SIGNATURES: usize = 64;

/// What is left to do for one signature.
#[derive(Debug)]
pub(super) struct Specialised {
    /// Host values that remaining steps (or outputs) read.
    pub(super) fixed: Vec<(ValueId, Value)>,
    /// Remaining steps, with the values nobody reads after each.
    pub(super) steps: Rc<[(usize, Vec<ValueId>)]>,
    /// What the steps make and what passes between them; absent where a value is no tensor.
    sizes: Option<Sizes>,
    /// The cuts of the present budget.
    segments: RefCell<Option<(u64, Rc<[Segment]>)>>,
}

impl Plan {
    /// Runs every step, letting go of device values that nobody reads any more. Gives the bytes of each value made (none
    /// for views of others), or `None` where one is no tensor.
    pub(super) fn run_all(
        &self,
        values: &mut [Option<Value>],
        device: Device,
        observe: &mut dyn FnMut(ValueId, &Value),
    ) -> Result<Option<HashMap<ValueId, u64>>> {
        for (id, v) in &self.constants {
            values[*id] = Some(v.clone());
        }
        let mut made = Some(HashMap::new());
        for (index, step) in self.steps.iter().enumerate() {
            run_step(step, values, device, observe)?;
            for &v in step.outputs.iter().flatten() {
                match &values[v] {
                    Some(Value::Device(t)) => {
                        let reads = step.inputs.iter().flatten().filter_map(|r| values[*r].as_ref());
                        let view = reads.filter_map(|r| match r {
                            Value::Device(r) => Some(r.data_ptr()),
                            _ => None,
                        });
                        let bytes = (t.numel() * t.kind().elt_size_in_bytes()) as u64;
                        let bytes = if view.into_iter().any(|p| p == t.data_ptr()) { 0 } else { bytes };
                        made.as_mut().map(|m| m.insert(v, bytes));
                    }
                    Some(Value::Host(_)) | None => {}
                    Some(Value::Sequence(_) | Value::Nothing) => made = None,
                }
            }
            for &v in &self.done_after[index] {
                if matches!(values[v], Some(Value::Device(_))) {
                    values[v] = None;
                }
            }
        }
        Ok(made)
    }

    pub(super) fn remember(&self, signature: Signature, s: Rc<Specialised>) {
        let mut known = self.specialised.borrow_mut();
        // Host inputs that never repeat must not fill the memory.
        if known.len() >= MOST_SIGNATURES {
            known.clear();
        }
        known.insert(signature, s);
    }

    pub(super) fn run_range(
        &self,
        s: &Specialised,
        range: std::ops::Range<usize>,
        values: &mut [Option<Value>],
        device: Device,
        observe: &mut dyn FnMut(ValueId, &Value),
    ) -> Result<()> {
        for (index, release) in &s.steps[range] {
            self.step(*index, values, device, observe)?;
            for &v in release {
                values[v] = None;
            }
        }
        Ok(())
    }

    /// The segments under the present budget; one or none where nothing is to be computed again.
    pub(super) fn segments(&self, s: &Specialised) -> Rc<[Segment]> {
        let budget = self.budget.get();
        let Some(sizes) = s.sizes.as_ref().filter(|_| budget > 0) else { return Rc::new([]) };
        let mut known = s.segments.borrow_mut();
        match &*known {
            Some((for_budget, found)) if *for_budget == budget => found.clone(),
            _ => {
                let cuts = segments::cuts(sizes, budget);
                let outputs = self.outputs.iter().map(|p| p.value).collect();
                let found: Rc<[Segment]> = segments::between(&cuts, &s.steps, &self.steps, &outputs).into();
                *known = Some((budget, found.clone()));
                found
            }
        }
    }

    /// Separates, after a complete run, what is settled for this signature from what has to run every time.
    pub(super) fn specialise(&self, values: &[Option<Value>], made: Option<HashMap<ValueId, u64>>) -> Specialised {
        let is_host = |v: &ValueId| values[*v].as_ref().is_some_and(Value::is_host);
        let mut remaining: Vec<usize> =
            (0..self.steps.len()).filter(|&i| !self.steps[i].outputs.iter().flatten().all(is_host)).collect();
        let outputs: HashSet<ValueId> = self.outputs.iter().map(|p| p.value).collect();
        // What only had to be there to have a shape is not computed again.
        let mut needed = outputs.clone();
        remaining.reverse();
        remaining.retain(|&i| {
            let kept = self.steps[i].outputs.iter().flatten().any(|v| needed.contains(v));
            if kept {
                needed.extend(self.steps[i].inputs.iter().flatten());
            }
            kept
        });
        remaining.reverse();
        let mut last_read: HashMap<ValueId, usize> = HashMap::new();
        for &i in &remaining {
            for v in self.steps[i].inputs.iter().chain(&self.steps[i].outputs).flatten() {
                last_read.insert(*v, i);
            }
        }
        let mut release: HashMap<usize, Vec<ValueId>> = HashMap::new();
        for (&v, &i) in last_read.iter().filter(|(v, _)| !outputs.contains(v)) {
            release.entry(i).or_default().push(v);
        }
        let mut fixed: Vec<(ValueId, Value)> = Vec::new();
        for v in last_read.keys().chain(&outputs).collect::<HashSet<_>>() {
            match &values[*v] {
                Some(value) if value.is_host() && !self.host_inputs.contains(v) => fixed.push((*v, value.clone())),
                _ => {}
            }
        }
        let sizes = made.map(|made| self.sizes(&remaining, &last_read, &made));
        Specialised {
            fixed,
            steps: remaining.into_iter().map(|i| (i, release.remove(&i).unwrap_or_default())).collect(),
            sizes,
            segments: RefCell::default(),
        }
    }

    /// Bytes that each remaining step makes, and bytes that pass it on to later steps.
    fn sizes(&self, remaining: &[usize], last_read: &HashMap<ValueId, usize>, made: &HashMap<ValueId, u64>) -> Sizes {
        let mut out = Sizes::default();
        let mut alive: HashMap<ValueId, u64> = HashMap::new();
        for &i in remaining {
            let bytes = |v: &ValueId| made.get(v).map(|b| (*v, *b));
            let mine: Vec<(ValueId, u64)> = self.steps[i].outputs.iter().flatten().filter_map(bytes).collect();
            out.made.push(mine.iter().map(|(_, b)| b).sum());
            alive.extend(mine);
            alive.retain(|v, _| last_read.get(v).is_some_and(|&last| last > i) || self.is_output(*v));
            out.live.push(alive.values().sum());
        }
        out
    }

    fn is_output(&self, v: ValueId) -> bool {
        self.outputs.iter().any(|p| p.value == v)
    }
}
