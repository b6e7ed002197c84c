//! Recomputation: a plan cut into segments so that a forward keeps only what passes the cuts; the backward pass runs each
//! segment again. Where the cuts lie follows from the sizes of the values and a budget.

use std::collections::HashSet;
use std::rc::Rc;

use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::graph::ValueId;
use crate::torch::convert::is_float;
use crate::torch::exec::kernel::Value;
use crate::torch::exec::step::{Step, run_step};
use crate::torch::training::{Autocast, recompute};

/// Sizes that decide about cuts: of each remaining step in order, the bytes that it makes, and the bytes made so far that
/// later steps still read.
#[derive(Debug, Clone, Default)]
pub struct Sizes {
    pub made: Vec<u64>,
    pub live: Vec<u64>,
}

/// Steps `start..end` of a specialised plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub start: usize,
    pub end: usize,
    /// Values from before that its steps read.
    pub reads: Vec<ValueId>,
    /// Values that its steps make and others read.
    pub makes: Vec<ValueId>,
}

/// Where to cut so that what passes the cuts and the largest segment together stay within `budget`: the fewest cuts that
/// do, or those with the smallest peak. Empty where everything fits as it is. A cut `k` lies after step `k`.
pub fn cuts(sizes: &Sizes, budget: u64) -> Vec<usize> {
    let total: u64 = sizes.made.iter().sum();
    if total <= budget || sizes.made.len() < 2 {
        return Vec::new();
    }
    let mut best: (u64, Vec<usize>) = (total, Vec::new());
    for parts in 2..=96u64 {
        let target = total / parts;
        let found = greedy(sizes, target.max(1));
        let peak = peak(sizes, &found);
        if peak < best.0 {
            best = (peak, found);
        }
        if best.0 <= budget {
            break;
        }
    }
    best.1
}

/// Cuts at about every `target` bytes, each where the least passes it.
fn greedy(sizes: &Sizes, target: u64) -> Vec<usize> {
    let mut out = Vec::new();
    let (mut sum, mut candidate): (u64, Option<usize>) = (0, None);
    let mut k = 0;
    while k + 1 < sizes.made.len() {
        sum += sizes.made[k];
        if sum * 10 >= target * 6 && candidate.is_none_or(|c| sizes.live[k] <= sizes.live[c]) {
            candidate = Some(k);
        }
        match candidate {
            Some(c) if sum * 10 >= target * 12 => {
                out.push(c);
                // The steps after the cut count again.
                (sum, candidate, k) = (0, None, c);
            }
            _ => {}
        }
        k += 1;
    }
    out
}

/// Bytes at the worst moment: everything that passes a cut, and the inner values of the largest segment.
pub fn peak(sizes: &Sizes, cuts: &[usize]) -> u64 {
    let passing: u64 = cuts.iter().map(|&k| sizes.live[k]).sum();
    let mut largest = 0;
    let mut start = 0;
    for end in cuts.iter().map(|k| k + 1).chain([sizes.made.len()]) {
        largest = largest.max(sizes.made[start..end].iter().sum());
        start = end;
    }
    passing + largest
}

/// The segments between cuts. `steps` as specialised, `outputs` of the plan.
pub fn between(
    cuts: &[usize],
    steps: &[(usize, Vec<ValueId>)],
    all: &[Step],
    outputs: &HashSet<ValueId>,
) -> Vec<Segment> {
    let mut bounds = vec![0];
    bounds.extend(cuts.iter().map(|k| k + 1));
    bounds.push(steps.len());
    let reads = |k: usize| all[steps[k].0].inputs.iter().flatten().copied();
    let makes = |k: usize| all[steps[k].0].outputs.iter().flatten().copied();
    bounds
        .windows(2)
        .map(|w| {
            let (start, end) = (w[0], w[1]);
            let mine: HashSet<ValueId> = (start..end).flat_map(makes).collect();
            let later: HashSet<ValueId> = (end..steps.len()).flat_map(reads).collect();
            let mut before: Vec<ValueId> = (start..end).flat_map(reads).filter(|v| !mine.contains(v)).collect();
            before.sort_unstable();
            before.dedup();
            let mut after: Vec<ValueId> =
                mine.into_iter().filter(|v| later.contains(v) || outputs.contains(v)).collect();
            after.sort_unstable();
            Segment { start, end, reads: before, makes: after }
        })
        .collect()
}

/// Runs one segment without keeping its inner values.
pub fn run(
    segment: &Segment,
    steps: &Rc<[Step]>,
    order: &Rc<[(usize, Vec<ValueId>)]>,
    values: &mut [Option<Value>],
    device: Device,
    bf16: bool,
) -> Result<()> {
    let (mut ids, mut tensors, mut others) = (Vec::new(), Vec::new(), Vec::new());
    for &v in &segment.reads {
        match &values[v] {
            Some(Value::Device(t)) if is_float(t.kind()) => {
                ids.push(v);
                tensors.push(t.shallow_clone());
            }
            Some(value) => others.push((v, value.clone())),
            None => {}
        }
    }
    let (steps, mine, size) = (steps.clone(), order.clone(), values.len());
    let inner = segment.clone();
    let piece = move |inputs: &[Tensor]| -> Result<Vec<Tensor>> {
        #[cfg(test)]
        tests::RUN_AGAIN.set(tests::RUN_AGAIN.get() + 1);
        // The backward pass runs outside the forward's guard.
        let _bf16 = Autocast::new(device, bf16);
        let mut values: Vec<Option<Value>> = vec![None; size];
        for (&v, t) in ids.iter().zip(inputs) {
            values[v] = Some(Value::device(t.shallow_clone()));
        }
        for (v, value) in &others {
            values[*v] = Some(value.clone());
        }
        for (index, release) in &mine[inner.start..inner.end] {
            run_step(&steps[*index], &mut values, device, &mut |_, _| {})?;
            for &v in release {
                values[v] = None;
            }
        }
        let missing = || Error::backend("a segment did not make its value");
        inner.makes.iter().map(|&v| Ok(values[v].take().ok_or_else(missing)?.tensor(device)?.shallow_clone())).collect()
    };
    let made = recompute(&tensors, segment.makes.len(), Box::new(piece))?;
    #[cfg(test)]
    tests::RUN_AGAIN.set(tests::RUN_AGAIN.get() - 1);
    for (&v, t) in segment.makes.iter().zip(made) {
        values[v] = Some(Value::device(t));
    }
    for (_, release) in &order[segment.start..segment.end] {
        for &v in release {
            values[v] = None;
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// How often this thread's backward passes ran a segment again.
        pub(crate) static RUN_AGAIN: Cell<i64> = const { Cell::new(0) };
    }

    #[test]
    fn a_chain_is_cut_at_about_the_root_of_its_length() {
        // 64 steps of 100 bytes, 10 of which pass each cut.
        let sizes = Sizes { made: vec![100; 64], live: vec![10; 64] };
        assert_eq!(cuts(&sizes, 6400), Vec::<usize>::new());
        let some = cuts(&sizes, 2000);
        assert!(peak(&sizes, &some) <= 2000 && some.len() <= 5, "{some:?}");
        let most = cuts(&sizes, 0);
        // n cuts: 10 n + 6400 / (n + 1) is smallest near n = 24, at about 500.
        assert!(peak(&sizes, &most) <= 560, "{most:?} {}", peak(&sizes, &most));
        assert!(most.windows(2).all(|w| w[0] < w[1]) && *most.last().unwrap() < 63);
    }

    #[test]
    fn cuts_lie_where_little_passes() {
        // Every fourth boundary is narrow.
        let live = (0..32).map(|k| if k % 4 == 3 { 1 } else { 500 }).collect();
        let sizes = Sizes { made: vec![100; 32], live };
        let found = cuts(&sizes, 900);
        assert!(!found.is_empty() && found.iter().all(|k| k % 4 == 3), "{found:?}");
        assert!(peak(&sizes, &found) <= 900);
    }
}
