//! Control flow: If, Loop, Scan and SequenceMap, each with plans of its subgraphs.

use tch::{Device, Tensor};

use crate::error::{Context, Error, Result};
use crate::graph::{Graph, Node};
use crate::torch::exec::kernel::{Args, Kernel, Outputs, Value};
use crate::torch::exec::plan::Plan;
use crate::torch::exec::registry::{Entry, MANY, Registry};
use crate::torch::ops::util;

pub fn register(r: &mut Registry) {
    r.add("If", 1, (1, 1), if_else);
    r.add("Loop", 1, (0, MANY), loop_over);
    r.add("Scan", 9, (1, MANY), scan);
    r.add_entry(Entry { domain: "", op: "Scan", since: 8, until: 8, inputs: (0, MANY), build: scan_8 });
    r.add("SequenceMap", 17, (1, MANY), sequence_map);
}

/// A subgraph ready to run: its plan, and where among the arguments each enclosing value arrives (after the inputs).
struct Sub {
    plan: Plan,
    captures: Vec<usize>,
    /// Declared rank and dimensions of each output, for stacking nothing.
    shapes: Vec<Option<Vec<i64>>>,
    kinds: Vec<Option<tch::Kind>>,
}

impl Sub {
    fn new(node: &Node, attribute: &str) -> Result<(Self, std::rc::Rc<Graph>)> {
        let graph = node
            .attributes
            .graph(attribute)?
            .ok_or_else(|| Error::invalid(format!("attribute `{attribute}` is missing")))?;
        let plan = Plan::new(&graph, &[], super::registry()).with_context(|| format!("subgraph `{attribute}`"))?;
        let captures = graph
            .captures
            .iter()
            .map(|(name, _)| {
                let at = node.captures.iter().position(|(n, _)| n == name);
                at.map(|i| node.inputs.len() + i)
                    .ok_or_else(|| Error::invalid(format!("enclosing value `{name}` is lost")))
            })
            .collect::<Result<_>>()?;
        let shapes =
            graph.outputs.iter().map(|p| p.dims().map(|d| d.into_iter().map(|d| d.unwrap_or(0) as i64).collect()));
        let kinds = graph.outputs.iter().map(|p| p.dtype.map(crate::torch::convert::kind));
        Ok((Self { plan, captures, shapes: shapes.collect(), kinds: kinds.collect() }, graph))
    }

    fn run(&self, a: &Args, inputs: &[Value]) -> Result<Vec<Value>> {
        let captures = self.captures.iter().map(|&i| a.value(i).cloned()).collect::<Result<Vec<_>>>()?;
        self.plan.run_sub(inputs, &captures, a.device())
    }

    /// Positions of the arguments whose elements the subgraph reads on the host, where its `outputs` are read there.
    fn host_captures(&self, outputs: &[usize]) -> Vec<usize> {
        self.plan.wanted_on_host(outputs).1.into_iter().map(|i| self.captures[i]).collect()
    }
}

fn if_else(node: &Node) -> Result<Kernel> {
    let (yes, _) = Sub::new(node, "then_branch")?;
    let (no, _) = Sub::new(node, "else_branch")?;
    let mut host = vec![0];
    host.extend(yes.host_captures(&[]));
    host.extend(no.host_captures(&[]));
    let dynamic = yes.plan.is_dynamic() || no.plan.is_dynamic();
    let kernel = Kernel::new(move |a| {
        let chosen = a.ints(0)?;
        match chosen.as_slice() {
            [c] => if *c != 0 { &yes } else { &no }.run(a, &[]),
            _ => Err(Error::invalid(format!("a condition of {} elements", chosen.len()))),
        }
    })
    .host(&host);
    Ok(if dynamic { kernel.dynamic() } else { kernel })
}

fn truth(v: &Value) -> Result<bool> {
    let t = v.tensor(Device::Cpu)?;
    if t.numel() != 1 {
        return Err(Error::invalid(format!("a condition of {} elements", t.numel())));
    }
    Ok(t.f_double_value(&[0i64; 8][..t.dim()])? != 0.0)
}

/// Whether an output of the body is its condition handed on, or a constant.
fn settled(body: &Graph, condition: usize) -> bool {
    let Some(port) = body.outputs.first() else { return false };
    let mut value = port.value;
    loop {
        if body.constants.contains_key(&value) || body.captures.iter().any(|(_, v)| *v == value) || value == condition {
            return true;
        }
        match body.nodes.iter().find(|n| n.outputs.first() == Some(&Some(value))) {
            Some(n) if n.is("Identity") && n.input(0).is_some() => value = n.input(0).unwrap_or(value),
            _ => return false,
        }
    }
}

/// More rounds than a network repeats anything: a damaged trip count would run for years.
const MOST_ROUNDS: i64 = 1 << 20;

fn loop_over(node: &Node) -> Result<Kernel> {
    let (body, graph) = Sub::new(node, "body")?;
    let inputs = node.inputs.len();
    let carried = inputs.saturating_sub(2);
    if graph.inputs.len() != carried + 2 || graph.outputs.len() < carried + 1 {
        return Err(Error::invalid(format!(
            "a body with {} inputs and {} outputs for {carried} carried values",
            graph.inputs.len(),
            graph.outputs.len()
        )));
    }
    let (has_count, has_condition) = (node.input(0).is_some(), node.input(1).is_some());
    let fixed_condition = settled(&graph, graph.inputs[1].value);
    if !has_count && fixed_condition && !has_condition {
        return Err(Error::invalid("neither a trip count nor a condition ends the loop"));
    }
    // What a carried value decides about in one round, its successor decides about in the next.
    let mut outputs = vec![0];
    let wanted = loop {
        let (wanted, _) = body.plan.wanted_on_host(&outputs);
        let before = outputs.len();
        for &i in wanted.iter().filter(|&&i| i >= 2) {
            if !outputs.contains(&(i - 1)) {
                outputs.push(i - 1);
            }
        }
        if outputs.len() == before {
            break wanted;
        }
    };
    let mut host = vec![0, 1];
    host.extend(wanted.into_iter().filter(|&i| i >= 2));
    host.extend(body.host_captures(&outputs));
    let dynamic = !fixed_condition || body.plan.is_dynamic();
    let kernel = Kernel::new(move |a| {
        let count = if a.has(0) { a.ints(0)?.first().copied().unwrap_or(0) } else { i64::MAX };
        let mut go = !a.has(1) || a.ints(1)?.first().is_none_or(|&c| c != 0);
        let mut state = (2..inputs).map(|i| a.value(i).cloned()).collect::<Result<Vec<_>>>()?;
        let mut scans: Vec<Vec<Value>> = vec![Vec::new(); body.shapes.len() - 1 - carried];
        let mut i = 0;
        while i < count && go {
            if i >= MOST_ROUNDS {
                return Err(Error::unsupported(format!("a loop of more than {MOST_ROUNDS} rounds"))
                    .hint("its condition never ends it, or its trip count is damaged"));
            }
            let mut round = vec![Value::host(Tensor::from(i)), Value::host(Tensor::from(go))];
            round.append(&mut state);
            let mut out = body.run(a, &round)?.into_iter();
            let condition = out.next().ok_or_else(|| Error::invalid("a loop body without outputs"))?;
            go = truth(&condition)?;
            state = out.by_ref().take(carried).collect();
            for (list, v) in scans.iter_mut().zip(out) {
                list.push(v);
            }
            i += 1;
        }
        for (k, list) in scans.iter().enumerate() {
            state.push(stack(list, 0, a.device(), &body, carried + 1 + k)?);
        }
        Ok(state)
    })
    .host(&host);
    Ok(if dynamic { kernel.dynamic() } else { kernel })
}

/// Joins the values of all rounds along a new axis.
fn stack(list: &[Value], axis: i64, device: Device, body: &Sub, output: usize) -> Result<Value> {
    if list.is_empty() {
        let (Some(shape), Some(kind)) = (&body.shapes[output], body.kinds[output]) else {
            return Err(Error::unsupported("a loop without rounds whose result has no declared shape"));
        };
        let mut shape = shape.clone();
        shape.insert(util::axis(axis, shape.len() + 1)? as usize, 0);
        return Ok(Value::device(Tensor::f_zeros(&shape[..], (kind, device))?));
    }
    let tensors = list.iter().map(|v| v.tensor(device)).collect::<Result<Vec<_>>>()?;
    Ok(Value::device(Tensor::f_stack(&tensors, axis)?))
}

/// Axes and directions of what a scan goes over.
struct Scan {
    body: Sub,
    states: usize,
    input_axes: Vec<i64>,
    input_reversed: Vec<bool>,
    output_axes: Vec<i64>,
    output_reversed: Vec<bool>,
}

impl Scan {
    fn new(node: &Node, values: usize) -> Result<Self> {
        let a = &node.attributes;
        let count =
            a.int("num_scan_inputs")?.ok_or_else(|| Error::invalid("attribute `num_scan_inputs` is missing"))?;
        let (body, graph) = Sub::new(node, "body")?;
        let count = usize::try_from(count).ok().filter(|&n| (1..=values).contains(&n));
        let count = count.ok_or_else(|| Error::invalid("attribute `num_scan_inputs` does not fit the inputs"))?;
        let states = values - count;
        if graph.inputs.len() != values || graph.outputs.len() < states {
            return Err(Error::invalid("the body's inputs and outputs do not fit the node's"));
        }
        let scanned_out = graph.outputs.len() - states;
        let list = |name: &str, len: usize| -> Result<Vec<i64>> {
            match a.ints(name)? {
                None => Ok(vec![0; len]),
                Some(v) if v.len() == len => Ok(v),
                Some(v) => Err(Error::invalid(format!("attribute `{name}` has {} entries, expected {len}", v.len()))),
            }
        };
        let flags = |v: Vec<i64>| v.into_iter().map(|d| d != 0).collect();
        let input_directions = if node.opset < 9 { "directions" } else { "scan_input_directions" };
        let host = body.plan.wanted_on_host(&[]);
        if !host.0.is_empty() {
            return Err(Error::unsupported("a scan whose body reads its inputs' elements to decide about shapes"));
        }
        Ok(Self {
            input_axes: list("scan_input_axes", count)?,
            input_reversed: flags(list(input_directions, count)?),
            output_axes: list("scan_output_axes", scanned_out)?,
            output_reversed: flags(list("scan_output_directions", scanned_out)?),
            body,
            states,
        })
    }

    fn run(&self, a: &Args, values: &[Value]) -> Result<Outputs> {
        let mut state = values[..self.states].to_vec();
        let sources = values[self.states..].iter().map(|v| v.tensor(a.device())).collect::<Result<Vec<_>>>()?;
        let axes =
            sources.iter().zip(&self.input_axes).map(|(t, &x)| util::axis(x, t.dim())).collect::<Result<Vec<_>>>()?;
        let lengths: Vec<i64> =
            sources.iter().zip(&axes).map(|(t, &x)| t.size().get(x as usize).copied().unwrap_or(0)).collect();
        let length = lengths[0];
        if lengths.iter().any(|&n| n != length) {
            return Err(Error::invalid(format!("scan inputs of lengths {lengths:?}")));
        }
        let mut scans: Vec<Vec<Value>> = vec![Vec::new(); self.output_axes.len()];
        for i in 0..length {
            let mut round = std::mem::take(&mut state);
            for ((t, &axis), &reversed) in sources.iter().zip(&axes).zip(&self.input_reversed) {
                round.push(Value::device(t.f_select(axis, if reversed { length - 1 - i } else { i })?));
            }
            let mut out = self.body.run(a, &round)?.into_iter();
            state = out.by_ref().take(self.states).collect();
            for (list, v) in scans.iter_mut().zip(out) {
                list.push(v);
            }
        }
        for (k, mut list) in scans.into_iter().enumerate() {
            if self.output_reversed[k] {
                list.reverse();
            }
            state.push(stack(&list, self.output_axes[k], a.device(), &self.body, self.states + k)?);
        }
        Ok(state)
    }
}

fn scan(node: &Node) -> Result<Kernel> {
    let inputs = node.inputs.len();
    let scan = Scan::new(node, inputs)?;
    let host = scan.body.host_captures(&[]);
    let dynamic = scan.body.plan.is_dynamic();
    let kernel = Kernel::new(move |a| {
        let values = (0..inputs).map(|i| a.value(i).cloned()).collect::<Result<Vec<_>>>()?;
        scan.run(a, &values)
    })
    .host(&host);
    Ok(if dynamic { kernel.dynamic() } else { kernel })
}

/// The first version had lengths as an input and a batch dimension everywhere.
fn scan_8(node: &Node) -> Result<Kernel> {
    if node.input(0).is_some() {
        return Err(Error::unsupported("Scan with sequence lengths").hint("export with opset 9 or newer"));
    }
    let inputs = node.inputs.len();
    let scan = Scan::new(node, inputs.saturating_sub(1))?;
    Ok(Kernel::new(move |a| {
        let batch = a.t(1)?.size().first().copied().unwrap_or(0);
        let mut rows: Vec<Outputs> = Vec::new();
        for b in 0..batch {
            let values = (1..inputs).map(|i| Ok(Value::device(a.t(i)?.f_select(0, b)?))).collect::<Result<Vec<_>>>()?;
            rows.push(scan.run(a, &values)?);
        }
        (0..rows.first().map_or(0, Vec::len))
            .map(|k| {
                let list: Vec<Value> = rows.iter().map(|r| r[k].clone()).collect();
                stack(&list, 0, a.device(), &scan.body, k)
            })
            .collect()
    }))
}

fn sequence_map(node: &Node) -> Result<Kernel> {
    let (body, graph) = Sub::new(node, "body")?;
    let inputs = node.inputs.len();
    let outputs = graph.outputs.len();
    let (wanted, _) = body.plan.wanted_on_host(&[]);
    let mut host = body.host_captures(&[]);
    host.extend(wanted);
    let dynamic = body.plan.is_dynamic();
    let kernel = Kernel::new(move |a| {
        let length = a.sequence(0)?.len();
        let mut lists: Vec<Vec<Value>> = vec![Vec::new(); outputs];
        for i in 0..length {
            let round = (0..inputs)
                .map(|k| match a.value(k)? {
                    Value::Sequence(items) => items
                        .get(i)
                        .cloned()
                        .ok_or_else(|| Error::invalid(format!("sequence {k} is shorter than the first"))),
                    v => Ok(v.clone()),
                })
                .collect::<Result<Vec<_>>>()?;
            for (list, v) in lists.iter_mut().zip(body.run(a, &round)?) {
                list.push(v);
            }
        }
        Ok(lists.into_iter().map(|l| Value::Sequence(l.into())).collect())
    })
    .host(&host);
    Ok(if dynamic { kernel.dynamic() } else { kernel })
}
