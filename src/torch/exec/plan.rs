//! The plan: an imported graph ready to run, immutable, shared by every copy of a network.
//!
//! A plan is specialised for each input signature (shapes, element types, device) when it first meets it: everything that
//! follows from shapes and constants is computed once on the host and kept, and only steps that depend on the data or on
//! parameters remain. A forward therefore never waits for the device.

mod specialise;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::{Graph, Port, ValueId};
use crate::torch::convert;
use crate::torch::exec::kernel::Value;
use crate::torch::exec::registry::Registry;
use crate::torch::exec::step::{Step, done_after, run_step, wanted_on_host};
use crate::torch::exec::{host_dependence, segments, straight_through};
use crate::torch::training;

use specialise::Specialised;

/// Learns of each value as it is made.
type Observe<'a> = dyn FnMut(ValueId, &Value) + 'a;

/// Outputs by name, and the tapped values in the order asked for.
pub type Tapped = (Vec<(String, Tensor)>, Vec<Option<Tensor>>);

/// An imported graph that is ready to run: immutable, and shared by all copies of a network.
#[derive(Debug)]
pub struct Plan {
    steps: Rc<[Step]>,
    values: usize,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    /// Buffers and other constants.
    constants: Vec<(ValueId, Value)>,
    /// The value that each parameter is, in the order of the parameter set.
    parameters: Vec<ValueId>,
    /// Values of an enclosing graph, for the plan of a subgraph.
    captures: Vec<ValueId>,
    /// Inputs in half precision that the graph computes in f32: given in f32 they are taken as they are.
    widened: HashSet<ValueId>,
    /// Graph inputs whose elements decide about shapes.
    host_inputs: HashSet<ValueId>,
    dynamic: bool,
    specialised: RefCell<HashMap<Signature, Rc<Specialised>>>,
    /// Bytes that a forward may keep for its backward pass; 0: no limit.
    budget: Cell<u64>,
    /// Values that nobody reads after each step.
    done_after: Vec<Vec<ValueId>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Signature {
    device: Device2,
    inputs: Vec<(Vec<i64>, i32)>,
    /// Elements of host inputs.
    host: Vec<Vec<i64>>,
}

/// `tch::Device` has no `Hash`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Device2(i64);

impl From<Device> for Device2 {
    fn from(d: Device) -> Self {
        Self(match d {
            Device::Cpu => -1,
            Device::Cuda(i) => i as i64,
            Device::Mps => -2,
            Device::Vulkan => -3,
        })
    }
}

impl Plan {
    /// Builds every operator of the graph. `parameters` are the constants that vary between copies, `operators` the kernels that
    /// there are.
    ///
    /// Errors: all nodes that cannot be imported, each with its reason.
    pub fn new(graph: &Graph, parameters: &[ValueId], operators: &Registry) -> Result<Self> {
        let rewritten = straight_through::fake_quantized(graph);
        let nodes = rewritten.as_ref().unwrap_or(&graph.nodes);
        let kernels = operators.build_all(nodes)?;
        host_dependence::check(graph, nodes, &kernels, parameters)?;
        let steps: Rc<[Step]> = nodes
            .iter()
            .zip(kernels)
            .map(|(n, kernel)| Step {
                kernel,
                inputs: n.inputs.iter().copied().chain(n.captures.iter().map(|(_, v)| Some(*v))).collect(),
                outputs: n.outputs.clone(),
                label: n.label(),
            })
            .collect();
        let mut host_inputs = wanted_on_host(&steps, []);
        host_inputs.retain(|v| graph.inputs.iter().any(|p| p.value == *v));
        let varying: HashSet<ValueId> = parameters.iter().copied().collect();
        let constants = graph
            .constants
            .iter()
            .filter(|(id, _)| !varying.contains(id))
            .map(|(&id, c)| Ok((id, Value::host(convert::to_torch(&c.tensor)?))))
            .collect::<Result<_>>()?;
        Ok(Self {
            captures: graph.captures.iter().map(|(_, v)| *v).collect(),
            widened: nodes
                .iter()
                .filter(|n| n.domain == "disback" && n.op == "Widen")
                .filter_map(|n| n.input(0))
                .collect(),
            host_inputs,
            dynamic: steps.iter().any(|s| s.kernel.dynamic),
            done_after: done_after(&steps, &graph.outputs),
            steps,
            values: graph.names.len(),
            inputs: graph.inputs.clone(),
            outputs: graph.outputs.clone(),
            constants,
            parameters: parameters.to_vec(),
            specialised: RefCell::default(),
            budget: Cell::new(0),
        })
    }

    /// The graph's inputs, in the order of the file.
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }
    /// The graph's outputs, in the order of the file.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }
    /// Number of operator calls before specialisation.
    pub fn len(&self) -> usize {
        self.steps.len()
    }
    /// Whether the graph calls no operator: its outputs are inputs, parameters or constants.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Runs the plan: named inputs in any order, parameters in the plan's order; outputs in the graph's order.
    ///
    /// Errors: missing or unknown inputs, an operator that fails (named), a shape that depends on the data.
    pub fn run(
        &self,
        inputs: &[(&str, &Tensor)],
        parameters: &[Tensor],
        device: Device,
    ) -> Result<Vec<(String, Tensor)>> {
        let inputs: Vec<_> = inputs.iter().map(|(n, t)| (*n, Value::device(t.shallow_clone()))).collect();
        let values = self.execute(&inputs, parameters, device, None)?;
        self.outputs
            .iter()
            .map(|p| {
                let v = values[p.value]
                    .as_ref()
                    .ok_or_else(|| Error::invalid(format!("output `{}` was not made", p.name)))?;
                Ok((p.name.clone(), v.tensor(device)?.shallow_clone()))
            })
            .collect()
    }

    /// [`Plan::run`], and beside the outputs these values inside the graph; `None` for one that is settled by shapes and
    /// constants alone.
    pub fn run_tapped(
        &self,
        inputs: &[(&str, &Tensor)],
        parameters: &[Tensor],
        device: Device,
        taps: &[ValueId],
    ) -> Result<Tapped> {
        let mut tapped: Vec<Option<Tensor>> = taps.iter().map(|_| None).collect();
        let mut observe = |id: ValueId, value: &Value| {
            if let Value::Device(t) = value {
                for (_, place) in taps.iter().zip(&mut tapped).filter(|(tap, _)| **tap == id) {
                    *place = Some(t.shallow_clone());
                }
            }
        };
        let values = self.run_values(inputs, parameters, device, &mut observe)?;
        let outputs = self.collect(&values, &self.outputs)?;
        let named =
            self.outputs.iter().zip(&outputs).map(|(p, v)| Ok((p.name.clone(), v.tensor(device)?.shallow_clone())));
        Ok((named.collect::<Result<_>>()?, tapped))
    }

    /// [`Plan::run`], calling `observe` with every value as it is made; all values that are still alive at the end.
    pub fn run_values(
        &self,
        inputs: &[(&str, &Tensor)],
        parameters: &[Tensor],
        device: Device,
        observe: &mut dyn FnMut(ValueId, &Value),
    ) -> Result<Vec<Option<Value>>> {
        let inputs: Vec<_> = inputs.iter().map(|(n, t)| (*n, Value::device(t.shallow_clone()))).collect();
        self.execute(&inputs, parameters, device, Some(observe))
    }

    /// [`Plan::run`] for inputs and outputs of any type: sequences and optionals too.
    pub fn run_typed(
        &self,
        inputs: &[(&str, Value)],
        parameters: &[Tensor],
        device: Device,
        observe: &mut dyn FnMut(ValueId, &Value),
    ) -> Result<Vec<Value>> {
        let values = self.execute(inputs, parameters, device, Some(observe))?;
        self.collect(&values, &self.outputs)
    }

    fn collect(&self, values: &[Option<Value>], ports: &[Port]) -> Result<Vec<Value>> {
        let missing = |p: &Port| Error::invalid(format!("output `{}` was not made", p.name));
        ports.iter().map(|p| values[p.value].clone().ok_or_else(|| missing(p))).collect()
    }

    /// Runs the plan of a subgraph: its inputs and the enclosing values it refers to, both in its own order.
    pub fn run_sub(&self, inputs: &[Value], captures: &[Value], device: Device) -> Result<Vec<Value>> {
        if inputs.len() != self.inputs.len() || captures.len() != self.captures.len() {
            return Err(Error::invalid(format!("{} inputs for a subgraph with {}", inputs.len(), self.inputs.len())));
        }
        let mut values: Vec<Option<Value>> = vec![None; self.values];
        for (id, v) in &self.constants {
            values[*id] = Some(v.clone());
        }
        let ids = self.inputs.iter().map(|p| &p.value).chain(&self.captures);
        for (&id, v) in ids.zip(inputs.iter().chain(captures)) {
            values[id] = Some(v.clone());
        }
        for index in 0..self.steps.len() {
            self.step(index, &mut values, device, &mut |_, _| {})?;
        }
        self.collect(&values, &self.outputs)
    }

    /// For the plan of a subgraph: which of its inputs and captures decide about shapes, where `outputs` (by index) do.
    pub fn wanted_on_host(&self, outputs: &[usize]) -> (Vec<usize>, Vec<usize>) {
        let seeds = outputs.iter().filter_map(|&i| self.outputs.get(i)).map(|p| p.value);
        let wanted = wanted_on_host(&self.steps, seeds);
        let inputs = (0..self.inputs.len()).filter(|&i| wanted.contains(&self.inputs[i].value)).collect();
        let captures = (0..self.captures.len()).filter(|&i| wanted.contains(&self.captures[i])).collect();
        (inputs, captures)
    }

    /// Whether shapes inside depend on the data.
    pub fn is_dynamic(&self) -> bool {
        self.dynamic
    }

    /// Whether the elements of this graph input are read on the host.
    pub fn is_host_input(&self, port: &Port) -> bool {
        self.host_inputs.contains(&port.value)
    }

    /// Somebody who observes sees every value, so nothing is left to be computed again.
    fn execute(
        &self,
        inputs: &[(&str, Value)],
        parameters: &[Tensor],
        device: Device,
        observe: Option<&mut Observe>,
    ) -> Result<Vec<Option<Value>>> {
        if parameters.len() != self.parameters.len() {
            return Err(Error::mismatch(format!(
                "{} parameters, expected {}",
                parameters.len(),
                self.parameters.len()
            )));
        }
        let mut values: Vec<Option<Value>> = vec![None; self.values];
        let mut signature = Signature { device: device.into(), inputs: Vec::new(), host: Vec::new() };
        let mut dynamic = self.dynamic;
        for (name, _) in inputs {
            if !self.inputs.iter().any(|p| p.name == *name) {
                return Err(self.no_such_input(name));
            }
        }
        for port in &self.inputs {
            let v = inputs.iter().find(|(n, _)| *n == port.name).map(|(_, v)| v);
            let v = v.ok_or_else(|| Error::usage(format!("input `{}` ({}) is missing", port.name, port.describe())))?;
            if matches!(v, Value::Sequence(_) | Value::Nothing) {
                // The number of elements is part of no signature.
                dynamic = true;
                values[port.value] = Some(v.clone());
                continue;
            }
            let t = v.tensor(Device::Cpu)?;
            check_input(port, t, self.widened.contains(&port.value))?;
            signature.inputs.push((t.size(), t.kind() as i32));
            values[port.value] = Some(if self.host_inputs.contains(&port.value) {
                if t.requires_grad() {
                    return Err(Error::usage(format!(
                        "input `{}` decides about shapes or branches: no gradient flows to it",
                        port.name
                    )));
                }
                let cpu = t.f_to_device(Device::Cpu)?;
                signature.host.push(convert::to_host(&cpu)?.to_f64().iter().map(|v| v.to_bits() as i64).collect());
                Value::host(cpu)
            } else {
                Value::device(t.f_to_device(device)?)
            });
        }
        for (&id, t) in self.parameters.iter().zip(parameters) {
            values[id] = Some(Value::device(t.shallow_clone()));
        }
        let mut known = self.specialised.borrow().get(&signature).cloned();
        let recompute = observe.is_none() && self.budget.get() > 0 && training::grad_enabled();
        let mut nobody = |_: ValueId, _: &Value| {};
        let observe = observe.unwrap_or(&mut nobody);
        if known.is_none() && !dynamic && recompute {
            // Under a budget the first run of a signature must keep to it too: a run without a graph finds the sizes.
            let mut scratch = values.clone();
            let made = tch::no_grad(|| self.run_all(&mut scratch, device, &mut |_, _| {}))?;
            let found = Rc::new(self.specialise(&scratch, made));
            self.remember(Signature::clone(&signature), found.clone());
            known = Some(found);
        }
        match known {
            Some(s) => {
                for (id, v) in &s.fixed {
                    values[*id] = Some(v.clone());
                }
                let segments = if recompute { self.segments(&s) } else { Rc::new([]) };
                if segments.len() > 1 {
                    let bf16 = training::autocast_enabled(device);
                    let (last, first) = segments.split_last().expect("two at least");
                    for segment in first {
                        segments::run(segment, &self.steps, &s.steps, &mut values, device, bf16)?;
                    }
                    // The backward pass begins with the last one: nothing is won by computing it twice.
                    self.run_range(&s, last.start..last.end, &mut values, device, observe)?;
                } else {
                    self.run_range(&s, 0..s.steps.len(), &mut values, device, observe)?;
                }
            }
            None => {
                let made = self.run_all(&mut values, device, observe)?;
                if !dynamic {
                    self.remember(signature, Rc::new(self.specialise(&values, made)));
                }
            }
        }
        Ok(values)
    }

    /// Lets a forward that records a graph keep at most about so many bytes for its backward pass; 0: no limit. Copies of
    /// the network share it.
    pub fn set_budget(&self, bytes: u64) {
        self.budget.set(bytes);
    }

    fn step(
        &self,
        index: usize,
        values: &mut [Option<Value>],
        device: Device,
        observe: &mut dyn FnMut(ValueId, &Value),
    ) -> Result<()> {
        run_step(&self.steps[index], values, device, observe)
    }

    fn no_such_input(&self, name: &str) -> Error {
        let names: Vec<_> = self.inputs.iter().map(|p| format!("`{}`", p.name)).collect();
        Error::usage(format!("the graph has no input `{name}`; its inputs are {}", names.join(", ")))
    }
}

/// Rank, element type and fixed dimensions of an input against what the graph declares.
fn check_input(port: &Port, t: &Tensor, widened: bool) -> Result<()> {
    let bad = |what: String| Err(Error::usage(format!("input `{}`: {what}, expected {}", port.name, port.describe())));
    if let Some(dtype) = port.dtype
        && convert::kind(dtype) != t.kind()
        && !(widened && t.kind() == Kind::Float)
    {
        return bad(format!("element type {:?}", t.kind()));
    }
    if let Some(dims) = port.dims() {
        let size = t.size();
        let fits = dims.len() == size.len() && dims.iter().zip(&size).all(|(d, &n)| d.is_none_or(|d| d as i64 == n));
        if !fits {
            return bad(format!("shape {size:?}"));
        }
    }
    Ok(())
}
