//! A network: an imported ONNX graph (shared) and one set of parameters (its own).

use std::cell::Cell;
use std::collections::HashSet;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::error::{Context, Error, Kind as ErrorKind, Result};
use crate::graph::depth::{self, Places};
use crate::graph::fuse::{self, Report};
use crate::graph::roles::{self, Buffer, Parameter};
use crate::graph::{Graph, Model, Port, TrainableChoice, ValueId, calls, lower, narrow, widen};
use crate::onnx::ModelProto;
use crate::tensor::{DType, HostTensor};
use crate::torch::convert;
use crate::torch::exec::kernel::Value;
use crate::torch::exec::plan::Plan;
use crate::torch::exec::{host_dependence, registry};
use crate::torch::file_layout::FileLayout;
use crate::torch::operators::Operators;
use crate::torch::params::ParamSet;
use crate::torch::train::bf16_storage;
use crate::torch::train::lora::{Adapter, LoraOptions};
use crate::torch::training::{Autocast, Compute};

/// Tensors by the names of graph outputs.
pub type NamedTensors = Vec<(String, Tensor)>;

/// What the method needs of a network: named inputs in, named outputs out, and its parameters.
pub trait Forward {
    /// Runs the network on named inputs (any order); outputs in the order of the graph. Differentiable with respect to
    /// the inputs and to the parameters that require a gradient.
    fn forward(&self, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>>;
    /// [`Forward::forward`], and beside the outputs the tensors of these names inside the network, in that order.
    ///
    /// Errors: a name that the network does not have.
    fn forward_tapped(&self, inputs: &[(&str, &Tensor)], taps: &[String]) -> Result<(NamedTensors, Vec<Tensor>)> {
        match taps.first() {
            None => Ok((self.forward(inputs)?, Vec::new())),
            Some(tap) => Err(no_such_tap(tap, &[])),
        }
    }
    /// Names of the tensors inside the network that depend on its inputs, in the order in which they are made.
    fn tap_names(&self) -> Vec<String> {
        Vec::new()
    }
    /// Where the tensors inside the network lie between its input `sample` and its output `output`. Empty for a network that is no graph.
    fn places(&self, _sample: &str, _output: &str) -> Places {
        Places::default()
    }
    /// The parameters of this copy.
    fn params(&self) -> &ParamSet;
    /// The weights of the whole network, where [`Forward::params`] are factors of a low-rank change to them.
    fn merged(&self) -> Result<Option<ParamSet>> {
        Ok(None)
    }
    /// Another copy: the same plan, its own parameters with equal values.
    fn copy(&self) -> Result<Box<dyn Forward>>;
    /// Another network with the very same parameters, not copies of them, that may be told to compute otherwise; none where a network
    /// knows no such thing.
    fn alias(&self) -> Option<Box<dyn Forward>> {
        None
    }
    /// Bytes of weights beside [`Forward::params`] that are trained through low-rank factors, shared by all copies.
    fn frozen(&self) -> u64 {
        0
    }
    /// Which parameters [`Forward::copy_narrow`] keeps in bf16.
    fn kernels(&self) -> Vec<bool> {
        vec![false; self.params().len()]
    }
    /// A copy for computing in bf16 ([`Compute::bf16`]) without gradients of its parameters: what would be rounded before every
    /// product lies in memory as bf16, so that the results are the same. Networks that do not know such weights are copied.
    fn copy_narrow(&self) -> Result<Box<dyn Forward>> {
        self.copy()
    }
    /// Fresh weights by [`crate::torch::train::init`], a function of the seed.
    ///
    /// Errors: a network that does not know which of its parameters are what; one whose weights are frozen.
    fn reinitialise(&self, _seed: u64) -> Result<()> {
        Err(Error::unsupported("fresh weights for a network that is no ONNX graph"))
    }
    /// Says how to compute from now on; copies made later do the same, and the memory's limit holds for earlier ones too.
    /// Networks without a plan compute as they always do.
    fn configure(&self, _compute: Compute) {}
}

/// How a model is imported.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// Whether decomposed operators are fused (`--no-fuse` turns it off).
    pub fuse: bool,
    /// Whether the layers of a file in half precision are computed in f32 (see `graph::widen`); otherwise as it is written.
    pub widen: bool,
    /// Whether a file in double precision is computed and trained in f32 (see `graph::narrow`); otherwise as it is written.
    pub narrow: bool,
    /// Which tensors are trained and which stay as they are.
    pub trainable: TrainableChoice,
    /// Operators beside those of this crate. The model is loaded with the same ([`Model::load_with`]).
    pub operators: Arc<Operators>,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self { fuse: true, widen: true, narrow: true, trainable: TrainableChoice::default(), operators: Arc::default() }
    }
}

/// Everything that the copies of a network share.
#[derive(Debug)]
pub struct Imported {
    /// The file as it was loaded; one in f64 in f32.
    pub model: Model,
    /// The graph as it runs: fused, its dead nodes gone.
    pub graph: Graph,
    /// Operators of the file, before fusing, with their counts.
    pub operators: std::collections::BTreeMap<String, usize>,
    /// The tensors that are trained, in the order of every copy's [`ParamSet`].
    pub parameters: Vec<Parameter>,
    /// The floating constants that are not trained, without those of one element.
    pub buffers: Vec<Buffer>,
    /// What fusing did; empty where it was turned off.
    pub fused: Report,
    /// Whether the file computes in half precision, and its layers in f32 here.
    pub widened: bool,
    /// Whether the file computes in f64, and everything in f32 here.
    pub narrowed: bool,
    /// The operators, ready to run.
    pub plan: Plan,
}

/// An imported ONNX graph with its own parameters.
#[derive(Debug)]
pub struct Network {
    shared: Rc<Imported>,
    params: ParamSet,
    /// With low-rank adaptation `params` are the factors.
    adapter: Option<Rc<Adapter>>,
    device: Device,
    compute: Cell<Compute>,
}

impl Network {
    /// Imports a model from a file onto a device with default options.
    pub fn load(path: &Path, device: Device) -> Result<Self> {
        Self::import(Model::load(path)?, &ImportOptions::default(), device)
    }

    /// Imports a model.
    ///
    /// Errors: whatever breaks ONNX's rules, all operators that are not supported, NaN or infinity in a weight.
    pub fn import(model: Model, options: &ImportOptions, device: Device) -> Result<Self> {
        let shown = model.path.display().to_string();
        Self::import_inner(model, options, device).map_err(|e| if shown.is_empty() { e } else { e.context(shown) })
    }

    fn import_inner(model: Model, options: &ImportOptions, device: Device) -> Result<Self> {
        let (model, narrowed) = match options.narrow.then(|| narrow::narrowed(&model)).transpose()?.flatten() {
            Some(narrow) => (narrow, true),
            None => (model, false),
        };
        let mut graph = lower::lower(&model)?;
        graph.remove_dead();
        let mut operators = std::collections::BTreeMap::new();
        for n in &graph.nodes {
            let name = if n.domain.is_empty() { n.op.clone() } else { format!("{}.{}", n.domain, n.op) };
            *operators.entry(name).or_insert(0) += 1;
        }
        let mut trainable = options.trainable.clone();
        let declared = roles::Declared::of(&model)?;
        if trainable.declared.is_none() {
            trainable.declared = declared.parameters;
        }
        let provenance = roles::untangle(&mut graph, trainable.declared.as_deref());
        let roles = roles::classify(&graph, &trainable, &provenance)?;
        let widened = options.widen && widen::widen(&mut graph);
        let values: Vec<_> = roles.parameters.iter().map(|p| p.value).collect();
        let trained = values.iter().copied().collect();
        if options.fuse && !widened {
            calls::restore(&mut graph, &model.calls, &|domain, op| options.operators.has_kernel(domain, op));
        }
        let fused = if options.fuse { fuse::fuse(&mut graph, &trained) } else { Report::default() };
        graph.remove_dead();
        host_dependence::check_branches(&graph)?;
        let advice = |e: Error| match e.kind() {
            ErrorKind::Unsupported => e.hint(registry::advice(model.proto.producer_name())),
            _ => e,
        };
        let plan = Plan::new(&graph, &values, options.operators.registry()).map_err(advice)?;
        let mut tensors = Vec::with_capacity(values.len());
        for p in &roles.parameters {
            let constant = graph
                .constants
                .get(&p.value)
                .ok_or_else(|| Error::invalid(format!("parameter `{}` is not read", p.name)))?;
            if !constant.tensor.is_finite() {
                return Err(Error::invalid(format!("tensor `{}` holds NaN or infinity", p.name))
                    .hint("the checkpoint is damaged, or overflowed when it was converted to half precision"));
            }
            let t = convert::to_torch(&constant.tensor)?;
            tensors.push(t.f_to_kind(tch::Kind::Float)?.f_to_device(device)?);
        }
        // The weights live in the parameter sets from here on.
        for v in &values {
            graph.constants.remove(v);
        }
        let names = roles.parameters.iter().map(|p| p.name.clone()).collect();
        let laid = roles.parameters.iter().filter_map(|p| Some((p, declared.layouts.get(&p.name)?)));
        let layouts = laid.map(|(p, stored)| Ok((p.name.clone(), FileLayout::new(&p.name, stored, &p.shape)?)));
        let params = ParamSet::new(names, tensors)?.in_files(layouts.collect::<Result<_>>()?);
        let shared = Imported {
            model,
            graph,
            operators,
            parameters: roles.parameters,
            buffers: roles.buffers,
            fused,
            widened,
            narrowed,
            plan,
        };
        Ok(Self { shared: Rc::new(shared), params, adapter: None, device, compute: Cell::default() })
    }

    /// What this copy shares with all other copies of the network.
    pub fn shared(&self) -> &Imported {
        &self.shared
    }
    /// The device that the parameters lie on and the network computes on.
    pub fn device(&self) -> Device {
        self.device
    }
    /// The graph's inputs, in the order and with the element types of the file.
    pub fn inputs(&self) -> &[Port] {
        self.shared.plan.inputs()
    }
    /// The graph's outputs, in the order and with the element types of the file.
    pub fn outputs(&self) -> &[Port] {
        self.shared.plan.outputs()
    }

    /// Inputs as training feeds them: in f32 where the file has them in half precision and its layers are widened.
    pub fn fed_inputs(&self) -> Vec<Port> {
        let widened = |p: &Port| Port { dtype: p.dtype.map(|d| d.widened()), ..p.clone() };
        self.inputs().iter().map(|p| if self.shared.widened { widened(p) } else { p.clone() }).collect()
    }

    /// The original file with this set's weights in the place of its own.
    pub fn to_model(&self, params: &ParamSet) -> Result<ModelProto> {
        self.model_of(params, convert::to_host, false)
    }

    /// [`Network::to_model`], but the weights that the file has in half precision are in f32, as they are trained; the graph
    /// around them is as it was. Without a copy of the weights where they are f32 on the CPU: they must not change as long as
    /// the model is used.
    pub(crate) fn with_wide_weights(&self, params: &ParamSet) -> Result<ModelProto> {
        self.model_of(params, convert::to_host_shared, self.shared.widened)
    }

    fn model_of(&self, params: &ParamSet, host: fn(&Tensor) -> Result<HostTensor>, wide: bool) -> Result<ModelProto> {
        let values = params.tensors().iter().map(host).collect::<Result<Vec<HostTensor>>>()?;
        let shared = &self.shared;
        crate::graph::save::with_parameters(&shared.model.proto, &shared.parameters, &shared.buffers, &values, wide)
    }

    /// The master weights, cast where the graph computes in another element type. `bf16`: products round their operands.
    fn arguments(&self, bf16: bool) -> Result<Vec<Tensor>> {
        let adapted = self.adapter.as_ref().map(|a| a.weights(&self.params)).transpose()?;
        self.shared
            .parameters
            .iter()
            .zip(adapted.as_deref().unwrap_or(self.params.tensors()))
            .map(|(p, t)| {
                let kind =
                    if self.shared.widened && p.dtype != DType::F64 { Kind::Float } else { convert::kind(p.dtype) };
                let rounded = bf16 && t.kind() == Kind::BFloat16;
                Ok(if t.kind() == kind || rounded { t.shallow_clone() } else { t.f_to_kind(kind)? })
            })
            .collect()
    }

    /// Runs the network and shows every intermediate value as it is made.
    pub fn observe(&self, inputs: &[(&str, &Tensor)], observe: &mut dyn FnMut(usize, &Value)) -> Result<()> {
        let args = self.arguments(false)?;
        self.shared.plan.run_values(inputs, &args, self.device, observe).map(drop)
    }

    /// [`Forward::copy`] as a network.
    pub fn duplicate(&self) -> Result<Self> {
        Ok(Self {
            shared: self.shared.clone(),
            params: self.params.deep_copy(self.device)?,
            adapter: self.adapter.clone(),
            device: self.device,
            compute: self.compute.clone(),
        })
    }

    /// Another handle on the same network with the same weights.
    pub fn alias(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            params: self.params.alias(),
            adapter: self.adapter.clone(),
            device: self.device,
            compute: self.compute.clone(),
        }
    }

    /// The same network with these weights: shared where they are of its kind and on its device, else copied.
    ///
    /// Errors: parameters of another network.
    pub fn with_weights(&self, params: &ParamSet) -> Result<Self> {
        let alike =
            |(a, b): (&Tensor, &Tensor)| a.size() == b.size() && a.kind() == b.kind() && a.device() == b.device();
        let same = self.adapter.is_none() && params.names() == self.params.names();
        if same && self.params.tensors().iter().zip(params.tensors()).all(alike) {
            return Ok(Self { params: params.alias(), ..self.alias() });
        }
        let copy = self.duplicate()?;
        copy.params().copy_from(params)?;
        Ok(copy)
    }

    /// The same network with low-rank adaptation: its weights are frozen, its parameters are the factors, and its copies
    /// share the weights. It computes what it did before.
    pub fn adapt(self, options: &LoraOptions) -> Result<Self> {
        let (adapter, params) = Adapter::new(self.params, &self.shared.parameters, options)?;
        Ok(Self { params, adapter: Some(adapter), ..self })
    }
}

/// What is said of a name that no tensor of the graph has.
pub(crate) fn no_such_tap(name: &str, known: &[String]) -> Error {
    let error = Error::usage(format!("the graph has no tensor `{name}`"));
    let likeness = |k: &&String| (strsim::normalized_damerau_levenshtein(name, k) * 1e6) as u64;
    match known.iter().max_by_key(likeness) {
        Some(nearest) if likeness(&nearest) > 600_000 => error.hint(format!("did you mean `{nearest}`?")),
        _ => error,
    }
}

impl Forward for Network {
    fn forward(&self, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>> {
        let bf16 = self.compute.get().bf16;
        let args = self.arguments(bf16)?;
        let _bf16 = Autocast::new(self.device, bf16);
        self.shared.plan.run(inputs, &args, self.device).with_context(|| self.shared.model.path.display().to_string())
    }

    fn forward_tapped(&self, inputs: &[(&str, &Tensor)], taps: &[String]) -> Result<(NamedTensors, Vec<Tensor>)> {
        if taps.is_empty() {
            return Ok((self.forward(inputs)?, Vec::new()));
        }
        let graph = &self.shared.graph;
        let made = |name: &String| {
            let mut outputs = graph.nodes.iter().flat_map(|n| n.outputs.iter().flatten());
            outputs.find(|v| graph.names[**v] == *name).copied().ok_or_else(|| no_such_tap(name, &self.tap_names()))
        };
        let ids = taps.iter().map(made).collect::<Result<Vec<_>>>()?;
        let bf16 = self.compute.get().bf16;
        let args = self.arguments(bf16)?;
        let _bf16 = Autocast::new(self.device, bf16);
        let path = || self.shared.model.path.display().to_string();
        let (outputs, tapped) = self.shared.plan.run_tapped(inputs, &args, self.device, &ids).with_context(path)?;
        let named = tapped.into_iter().zip(taps).map(|(t, name)| {
            t.ok_or_else(|| Error::usage(format!("the tensor `{name}` does not depend on the graph's inputs")))
        });
        Ok((outputs, named.collect::<Result<_>>()?))
    }

    fn tap_names(&self) -> Vec<String> {
        let graph = &self.shared.graph;
        let mut varies: HashSet<ValueId> = graph.inputs.iter().map(|p| p.value).collect();
        let mut names = Vec::new();
        for node in &graph.nodes {
            // Of a shape nothing is left but numbers.
            if !matches!(node.op.as_str(), "Shape" | "Size") && node.inputs.iter().flatten().any(|v| varies.contains(v))
            {
                varies.extend(node.outputs.iter().flatten());
                names.extend(node.outputs.iter().flatten().map(|v| graph.names[*v].clone()));
            }
        }
        names
    }

    fn places(&self, sample: &str, output: &str) -> Places {
        depth::places(&self.shared.graph, sample, output)
    }

    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn merged(&self) -> Result<Option<ParamSet>> {
        self.adapter.as_ref().map(|a| a.merged(&self.params)).transpose()
    }

    fn copy(&self) -> Result<Box<dyn Forward>> {
        Ok(Box::new(self.duplicate()?))
    }

    fn alias(&self) -> Option<Box<dyn Forward>> {
        Some(Box::new(Network::alias(self)))
    }

    fn frozen(&self) -> u64 {
        self.adapter.as_ref().map_or(0, |a| a.bytes())
    }

    fn kernels(&self) -> Vec<bool> {
        match self.adapter {
            // The factors are small, and the weights beside them shared.
            Some(_) => vec![false; self.params.len()],
            None => bf16_storage::kernels(&self.shared.graph, &self.shared.parameters, self.shared.widened),
        }
    }

    fn copy_narrow(&self) -> Result<Box<dyn Forward>> {
        if self.adapter.is_some() {
            return self.copy();
        }
        let params = bf16_storage::narrowed(&self.params, &self.kernels())?;
        Ok(Box::new(Self { params, ..self.alias() }))
    }

    fn reinitialise(&self, seed: u64) -> Result<()> {
        if self.adapter.is_some() {
            return Err(Error::usage(
                "fresh weights with low-rank adaptation, which would keep them frozen as they are",
            )
            .hint("student.init = \"random\" and lora.rank do not go together"));
        }
        crate::torch::train::init::reinitialise(&self.shared.graph, &self.shared.parameters, &self.params, seed)
    }

    fn configure(&self, compute: Compute) {
        self.compute.set(compute);
        self.shared.plan.set_budget(compute.activation_bytes);
    }
}
