//! LayerNormalization, RMSNormalization and GroupNormalization out of `Normalize` calls (see [`crate::graph::fuse`]).

use crate::graph::{Node, ValueId};
use crate::tensor::HostTensor;

use crate::graph::edit::{float_attribute, int_attribute};
use crate::passes::fuse::{Emit, Look, broadcast, ends};

type Outcome = Result<(), String>;

/// The operator that a call is, and its nodes or why there are none.
pub(super) fn write(node: &Node, look: &Look<'_>, emit: &mut Emit<'_>) -> (&'static str, Outcome) {
    match node.op.as_str() {
        "GroupNorm" => ("GroupNormalization", groups(node, look, emit)),
        "RMSNorm" => ("RMSNormalization", over_axes(node, look, emit, "RMSNormalization")),
        _ => ("LayerNormalization", over_axes(node, look, emit, "LayerNormalization")),
    }
}

fn epsilon(node: &Node) -> f32 {
    let held = node.attributes.tensor("epsilon").ok().flatten();
    held.and_then(|t| t.to_f64().first().copied()).unwrap_or(1e-5) as f32
}

/// The axes of the norm among `rank`, in order.
fn axes(node: &Node, rank: usize) -> Result<Vec<usize>, String> {
    let mut axes: Vec<usize> = match node.attributes.ints("axes").map_err(|e| e.to_string())? {
        None => (2..rank).collect(),
        Some(list) => {
            let wrap = |a: i64| usize::try_from(if a < 0 { a + rank as i64 } else { a }).ok().filter(|&a| a < rank);
            list.into_iter().map(wrap).collect::<Option<_>>().ok_or("its axes do not fit its operand")?
        }
    };
    axes.sort_unstable();
    Ok(axes)
}

/// A norm over the last axes.
fn over_axes(node: &Node, look: &Look<'_>, emit: &mut Emit<'_>, op: &str) -> Outcome {
    let (x, y) = ends(node, look)?;
    if node.input(3).is_some() {
        return Err("a root mean square over groups".into());
    }
    let shapes = look.shapes(node.input(0))?;
    let rank = shapes[0].len();
    let axes = axes(node, rank)?;
    let first = axes.first().copied().ok_or("it has no axes")?;
    if !axes.iter().copied().eq(first..rank) {
        return Err(format!("it runs over axes {axes:?} of {rank}, not over the last ones"));
    }
    let dims = look.fixed(&shapes, first).ok_or("the size of its axes varies")?;
    let mut inside = Affine::new(node, look);
    let scale = inside.scale(|t| broadcast(t, &dims));
    let bias = if op == "LayerNormalization" { inside.bias(|t| broadcast(t, &dims)) } else { None };
    let ones = || HostTensor::new(&dims, &vec![1f32; dims.iter().product()]).unwrap_or(HostTensor::scalar(1f32));
    let mut inputs = vec![x.to_owned(), emit.constant(&format!("{y}/scale"), &scale.unwrap_or_else(ones))];
    inputs.extend(bias.map(|b| emit.constant(&format!("{y}/bias"), &b)));
    let attributes = vec![
        int_attribute("axis", first as i64 - rank as i64),
        float_attribute("epsilon", epsilon(node)),
        int_attribute("stash_type", 1),
    ];
    inside.finish(look, emit, y, op, &inputs, attributes);
    Ok(())
}

/// A norm of groups of channels, channels in the second axis.
fn groups(node: &Node, look: &Look<'_>, emit: &mut Emit<'_>) -> Outcome {
    let (x, y) = ends(node, look)?;
    let shapes = look.shapes(node.input(0))?;
    if node.attributes.get("view").is_some() || shapes[0].len() < 3 {
        return Err("its channels are not in the second axis".into());
    }
    let rank = shapes[0].len();
    let channels = shapes[0][1];
    let target = |slot: usize, run: usize, of: &[usize]| -> Option<Vec<usize>> {
        resolve(&look.in_runs(node.input(slot)?)?.get(run)?.to_i64(), of)
    };
    let mut inner = Vec::new();
    for (run, shape) in shapes.iter().enumerate() {
        let split = target(3, run, shape).ok_or("the shape of its groups is unknown")?;
        let joined = target(4, run, &split).ok_or("the shape behind it is unknown")?;
        let grouped = split.len() >= 3 && split[0] == shape[0] && axes(node, split.len())? == every_but_two(&split);
        if joined != *shape || !grouped || split[1] == 0 || channels % split[1] != 0 {
            return Err("it does not split the channels of the second axis into groups".into());
        }
        inner = split;
    }
    if shapes.iter().any(|s| s[1] != channels) {
        return Err("the number of channels varies".into());
    }
    let (count, each) = (inner[1], channels / inner[1]);
    let within = node.attributes.get("inside").is_some();
    let own_axis = inner.len() > 3 && inner[2] == each;
    // One number a channel, whichever of the two shapes it meets.
    let per_channel = |t: &HostTensor| -> Option<HostTensor> {
        let flat = |t: HostTensor| t.reshaped(&[channels]).ok();
        let spread = |shape: &[usize], t: &HostTensor, kept: &[usize]| {
            // All axes but those kept are 1, so that only these are left.
            let missing = shape.len().checked_sub(t.rank())?;
            let own: Vec<usize> = std::iter::repeat_n(1, missing).chain(t.shape().iter().copied()).collect();
            let alone = own.iter().enumerate().all(|(i, &d)| d == 1 || kept.contains(&i));
            let sizes: Vec<usize> = kept.iter().map(|&i| own[i]).collect();
            alone.then(|| t.reshaped(&sizes).ok()).flatten()
        };
        if !within {
            return flat(broadcast(&spread(&vec![1; rank], t, &[1])?, &[channels])?);
        }
        let kept: &[usize] = if own_axis { &[1, 2] } else { &[1] };
        let t = spread(&vec![1; inner.len()], t, kept)?;
        let t = if own_axis { t } else { t.reshaped(&[t.len(), 1]).ok()? };
        flat(broadcast(&t, &[count, each])?)
    };
    let mut affine = Affine::new(node, look);
    let (scale, bias) = (affine.scale(per_channel), affine.bias(per_channel));
    if within && !affine.outside.is_empty() {
        return Err("its scale or bias is not one number a channel".into());
    }
    let constant = |v: f32| HostTensor::vec(&vec![v; channels]);
    let scale = emit.constant(&format!("{y}/scale"), &scale.unwrap_or_else(|| constant(1.0)));
    let bias = emit.constant(&format!("{y}/bias"), &bias.unwrap_or_else(|| constant(0.0)));
    let attributes = vec![int_attribute("num_groups", count as i64), float_attribute("epsilon", epsilon(node))];
    affine.finish(look, emit, y, "GroupNormalization", &[x.to_owned(), scale, bias], attributes);
    Ok(())
}

fn every_but_two(shape: &[usize]) -> Vec<usize> {
    (2..shape.len()).collect()
}

/// Scale and bias of a call: what the operator itself takes, and what has to stand behind it.
struct Affine<'a> {
    scale: Option<ValueId>,
    bias: Option<ValueId>,
    look: &'a Look<'a>,
    /// Operators behind the norm, with their operand.
    outside: Vec<(&'static str, ValueId)>,
}

impl<'a> Affine<'a> {
    fn new(node: &Node, look: &'a Look<'a>) -> Self {
        Self { scale: node.input(1), bias: node.input(2), look, outside: Vec::new() }
    }
    fn scale(&mut self, fit: impl Fn(&HostTensor) -> Option<HostTensor>) -> Option<HostTensor> {
        let v = self.scale?;
        let fitted = self.look.constant(Some(v)).and_then(fit);
        if fitted.is_none() {
            self.outside.push(("Mul", v));
        }
        fitted
    }
    /// After [`Affine::scale`]: a bias cannot be taken in before a scale that is not.
    fn bias(&mut self, fit: impl Fn(&HostTensor) -> Option<HostTensor>) -> Option<HostTensor> {
        let v = self.bias?;
        let fitted = self.look.constant(Some(v)).filter(|_| self.outside.is_empty()).and_then(fit);
        if fitted.is_none() {
            self.outside.push(("Add", v));
        }
        fitted
    }
    fn finish(
        mut self,
        look: &Look<'_>,
        emit: &mut Emit<'_>,
        y: &str,
        op: &str,
        inputs: &[String],
        attributes: Vec<crate::onnx::AttributeProto>,
    ) {
        if op == "RMSNormalization"
            && let Some(v) = self.bias
        {
            self.outside.push(("Add", v));
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let Some((last, v)) = self.outside.pop() else {
            return emit.node(op, &inputs, y, attributes);
        };
        let mut at = emit.value(op, &inputs, &format!("{y}/normalised"), attributes);
        for (op, v) in self.outside {
            at = emit.value(op, &[&at, look.name(v)], &format!("{y}/scaled"), Vec::new());
        }
        emit.node(last, &[&at, look.name(v)], y, Vec::new());
    }
}

/// ONNX's reshape rules: 0 copies, -1 is what remains.
fn resolve(wanted: &[i64], size: &[usize]) -> Option<Vec<usize>> {
    let total: usize = size.iter().product();
    let mut out: Vec<usize> = Vec::with_capacity(wanted.len());
    for (i, &d) in wanted.iter().enumerate() {
        out.push(match d {
            0 => *size.get(i)?,
            -1 => 1,
            d => usize::try_from(d).ok()?,
        });
    }
    if let Some(free) = wanted.iter().position(|&d| d == -1) {
        let rest: usize = out.iter().product();
        out[free] = (rest > 0 && total.is_multiple_of(rest)).then(|| total / rest)?;
    }
    (out.iter().product::<usize>() == total).then_some(out)
}
