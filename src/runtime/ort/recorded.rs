//! Calls that are recorded as a CUDA graph. A recording reads and writes fixed addresses: inputs are copied into tensors that
//! stay on the device, outputs stay where the first call made them.

use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, Session};
use ort::value::{DynTensor, DynTensorValueType};

use super::values;
use crate::error::{Context, Error, Result};
use crate::runtime::ValueInfo;
use crate::tensor::HostTensor;

/// One session's bindings, for one set of shapes.
pub struct Recorded {
    binding: IoBinding,
    inputs: Vec<DynTensor>,
    shapes: Vec<Vec<usize>>,
}

impl Recorded {
    /// Binds copies of these inputs (in the order of `infos`) on the device, and the outputs there.
    pub fn new(
        session: &Session,
        infos: &[ValueInfo],
        tensors: &[&HostTensor],
        outputs: &[ValueInfo],
        (place, device): (AllocationDevice<'static>, i32),
    ) -> Result<Self> {
        let mut binding = session.create_binding()?;
        let mut inputs = Vec::with_capacity(tensors.len());
        for (info, tensor) in infos.iter().zip(tensors) {
            let there = on_host(tensor)?.to(place.clone(), device).map_err(Error::from).context(&info.name)?;
            binding.bind_input(info.name.as_str(), &there)?;
            inputs.push(there);
        }
        let memory = MemoryInfo::new(place, device, AllocatorType::Device, MemoryType::Default)?;
        for info in outputs {
            binding.bind_output_to_device(info.name.as_str(), &memory)?;
        }
        Ok(Self { binding, inputs, shapes: tensors.iter().map(|t| t.shape().to_vec()).collect() })
    }

    /// Copies these inputs over those bound.
    ///
    /// Errors: other shapes than the recorded ones.
    pub fn feed(&mut self, infos: &[ValueInfo], tensors: &[&HostTensor]) -> Result<()> {
        for (k, tensor) in tensors.iter().enumerate() {
            if tensor.shape() != self.shapes[k] {
                return Err(Error::mismatch(format!(
                    "input `{}` is {:?}, but the call was recorded as a CUDA graph with {:?}",
                    infos[k].name,
                    tensor.shape(),
                    self.shapes[k]
                ))
                .hint("fix the batch with `disback export --batch N`, or leave --cuda-graph out"));
            }
            on_host(tensor)?.copy_into(&mut self.inputs[k]).map_err(Error::from).context(&infos[k].name)?;
        }
        Ok(())
    }

    /// Runs what is bound, and leaves the outputs where they are.
    pub fn call(&self, session: &mut Session) -> Result<()> {
        session.run_binding(&self.binding)?;
        Ok(self.binding.synchronize_outputs()?)
    }

    /// Runs what is bound; the outputs by name, copied to the host.
    pub fn run(&self, session: &mut Session, outputs: &[ValueInfo]) -> Result<Vec<(String, HostTensor)>> {
        let mut made = session.run_binding(&self.binding)?;
        self.binding.synchronize_outputs()?;
        outputs
            .iter()
            .map(|info| {
                let value =
                    made.remove(&info.name).ok_or_else(|| Error::backend(format!("no output `{}`", info.name)))?;
                let tensor: DynTensor = value.downcast::<DynTensorValueType>()?;
                let host = tensor.to(AllocationDevice::CPU, 0)?.into_dyn();
                Ok((info.name.clone(), values::output(&host).context(&info.name)?))
            })
            .collect()
    }
}

fn on_host(tensor: &HostTensor) -> Result<DynTensor> {
    Ok(values::owned(tensor)?.downcast::<DynTensorValueType>()?)
}
