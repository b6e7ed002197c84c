//! What one operator is once it is built: attributes parsed, a function from values to values, and which of its inputs it
//! needs on the host.

use std::any::Any;
use std::cell::OnceCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::tensor::HostTensor;
use crate::torch::convert;
use crate::torch::device::send;

/// A value while a plan runs.
#[derive(Debug, Clone)]
pub enum Value {
    /// Known from constants and shapes alone: lives on the CPU, moved to the device at most once.
    Host(Rc<HostValue>),
    /// Depends on the data.
    Device(Rc<Tensor>),
    /// An ONNX sequence.
    Sequence(Rc<[Value]>),
    /// An ONNX optional without a value; one with a value is the value itself.
    Nothing,
}

/// A host value and, once somebody asked for it, its copy on the device.
#[derive(Debug)]
pub struct HostValue {
    cpu: Tensor,
    moved: OnceCell<Tensor>,
}

impl Value {
    /// A host value from a CPU tensor.
    pub fn host(cpu: Tensor) -> Self {
        Self::Host(Rc::new(HostValue { cpu, moved: OnceCell::new() }))
    }
    /// A value that depends on the data, from a tensor on any device.
    pub fn device(t: Tensor) -> Self {
        Self::Device(Rc::new(t))
    }
    /// Whether the value is known from constants and shapes alone. A sequence is where all its elements are.
    pub fn is_host(&self) -> bool {
        match self {
            Self::Host(_) => true,
            Self::Device(_) => false,
            Self::Sequence(items) => items.iter().all(Self::is_host),
            Self::Nothing => true,
        }
    }
    /// The tensor on `device`.
    pub fn tensor(&self, device: Device) -> Result<&Tensor> {
        match self {
            Self::Device(t) => Ok(t),
            Self::Host(h) if device == Device::Cpu => Ok(&h.cpu),
            Self::Host(h) => {
                if h.moved.get().is_none() {
                    let moved = send(&h.cpu, device)?;
                    let _ = h.moved.set(moved);
                }
                Ok(h.moved.get().expect("set above"))
            }
            Self::Sequence(_) => Err(Error::invalid("a sequence where a tensor is expected")),
            Self::Nothing => Err(Error::invalid("an empty optional where a tensor is expected")),
        }
    }
    /// The same value known to be of the host, after a step that only saw host values.
    fn into_host(self) -> Self {
        match self {
            Self::Device(t) => match Rc::try_unwrap(t) {
                Ok(t) => Self::host(t),
                Err(t) => Self::host(t.shallow_clone()),
            },
            Self::Sequence(items) => Self::Sequence(items.iter().cloned().map(Self::into_host).collect()),
            host @ (Self::Host(_) | Self::Nothing) => host,
        }
    }
}

/// The arguments of one operator call.
#[derive(Debug)]
pub struct Args<'a> {
    pub(crate) values: Vec<Option<&'a Value>>,
    pub(crate) device: Device,
}

impl<'a> Args<'a> {
    /// Where results are made: the CPU while only host values take part.
    pub fn device(&self) -> Device {
        self.device
    }
    /// Number of input slots of the call; optional inputs that are left out in between are counted.
    pub fn len(&self) -> usize {
        self.values.len()
    }
    /// Whether the call has no inputs at all.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
    /// Whether the i-th input is given.
    pub fn has(&self, i: usize) -> bool {
        matches!(self.values.get(i), Some(Some(_)))
    }
    /// The i-th input as a value.
    pub fn value(&self, i: usize) -> Result<&'a Value> {
        self.values.get(i).copied().flatten().ok_or_else(|| Error::invalid(format!("input {i} is missing")))
    }
    /// The i-th input as a tensor on the device.
    pub fn t(&self, i: usize) -> Result<&'a Tensor> {
        self.value(i)?.tensor(self.device)
    }
    /// The i-th input as a tensor on the device, where given.
    pub fn opt(&self, i: usize) -> Result<Option<&'a Tensor>> {
        if self.has(i) { self.t(i).map(Some) } else { Ok(None) }
    }
    /// Dimensions of the i-th input; known on the host for every tensor.
    pub fn shape(&self, i: usize) -> Result<Vec<i64>> {
        Ok(match self.value(i)? {
            Value::Host(h) => h.cpu.size(),
            Value::Device(t) => t.size(),
            Value::Sequence(items) => vec![items.len() as i64],
            Value::Nothing => return Err(Error::invalid("an empty optional where a tensor is expected")),
        })
    }
    /// Element type of the i-th input. Errors: the input is missing, a sequence or an empty optional.
    pub fn kind(&self, i: usize) -> Result<Kind> {
        match self.value(i)? {
            Value::Host(h) => Ok(h.cpu.kind()),
            Value::Device(t) => Ok(t.kind()),
            Value::Sequence(_) => Err(Error::invalid("a sequence where a tensor is expected")),
            Value::Nothing => Err(Error::invalid("an empty optional where a tensor is expected")),
        }
    }
    /// The i-th input as a sequence.
    pub fn sequence(&self, i: usize) -> Result<&'a [Value]> {
        match self.value(i)? {
            Value::Sequence(items) => Ok(items),
            _ => Err(Error::invalid(format!("input {i} is not a sequence"))),
        }
    }
    /// The i-th input's elements on the host. An error where they depend on the data: reading them would stop the device
    /// in every step.
    pub fn host(&self, i: usize) -> Result<HostTensor> {
        match self.value(i)? {
            Value::Host(h) => convert::to_host(&h.cpu),
            _ => Err(Error::unsupported(format!(
                "input {i} decides about shapes but depends on the data, not only on shapes and constants"
            ))
            .hint("export with this value as a constant, or as an integer graph input")),
        }
    }
    /// The i-th input as host integers.
    pub fn ints(&self, i: usize) -> Result<Vec<i64>> {
        Ok(self.host(i)?.to_i64())
    }
    /// The i-th input as host integers, where given.
    pub fn opt_ints(&self, i: usize) -> Result<Option<Vec<i64>>> {
        if self.has(i) { self.ints(i).map(Some) } else { Ok(None) }
    }
    /// The i-th input as host floats.
    pub fn floats(&self, i: usize) -> Result<Vec<f64>> {
        Ok(self.host(i)?.to_f64())
    }
    /// The i-th input as host floats, where given.
    pub fn opt_floats(&self, i: usize) -> Result<Option<Vec<f64>>> {
        if self.has(i) { self.floats(i).map(Some) } else { Ok(None) }
    }
    /// The i-th input as one host number.
    pub fn scalar(&self, i: usize) -> Result<f64> {
        match self.floats(i)?.as_slice() {
            [v] => Ok(*v),
            other => Err(Error::invalid(format!("input {i} has {} elements, expected one", other.len()))),
        }
    }
}

/// Results of one operator call.
pub type Outputs = Vec<Value>;

/// One result.
pub fn one(t: Tensor) -> Result<Outputs> {
    Ok(vec![Value::device(t)])
}

type Run = dyn Fn(&Args) -> Result<Outputs>;

/// A built operator.
pub struct Kernel {
    run: Box<Run>,
    /// Input slots whose elements it reads on the host.
    pub host_slots: Vec<usize>,
    /// Reads only the shapes of its inputs, so that its result is a host value even for device inputs.
    pub shape_only: bool,
    /// Its result's shape depends on the data: nothing behind it can be decided once for all.
    pub dynamic: bool,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel").field("host_slots", &self.host_slots).finish_non_exhaustive()
    }
}

/// What a panic says, without libtorch's stack.
fn first_line(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let text = text.unwrap_or("unknown error");
    let text = text.split_once("Torch(\"").map_or(text, |(_, rest)| rest);
    text.split(['\n', '"']).next().unwrap_or_default().split("\\n").next().unwrap_or_default().to_owned()
}

impl Kernel {
    /// A kernel that runs this function. It reads no input on the host and its result's shape does not depend on the
    /// data, unless [`Kernel::host`], [`Kernel::shapes`] or [`Kernel::dynamic`] say otherwise.
    pub fn new(run: impl Fn(&Args) -> Result<Outputs> + 'static) -> Self {
        Self { run: Box::new(run), host_slots: Vec::new(), shape_only: false, dynamic: false }
    }
    /// Declares the inputs that are read on the host.
    #[must_use]
    pub fn host(mut self, slots: &[usize]) -> Self {
        self.host_slots = slots.to_vec();
        self
    }
    /// Declares that only shapes are read.
    #[must_use]
    pub fn shapes(mut self) -> Self {
        self.shape_only = true;
        self
    }
    /// Declares a data-dependent result shape.
    #[must_use]
    pub fn dynamic(mut self) -> Self {
        self.dynamic = true;
        self
    }

    /// Runs on `device`; on the CPU with a host result where everything it reads is a host value.
    pub fn call(&self, values: Vec<Option<&Value>>, device: Device) -> Result<Outputs> {
        let host = self.shape_only || values.iter().flatten().all(|v| v.is_host());
        let args = Args { values, device: if host { Device::Cpu } else { device } };
        // A tch call with a scalar argument that fails unwinds: dropping the scalar finds the error of the call pending.
        let out = catch_unwind(AssertUnwindSafe(|| (self.run)(&args)))
            .unwrap_or_else(|panic| Err(Error::backend(format!("libtorch: {}", first_line(panic.as_ref())))))?;
        Ok(if host { out.into_iter().map(Value::into_host).collect() } else { out })
    }
}
