//! Samples by libtorch: of the run's own weights, which no ONNX engine has touched, and of the student file imported again.

use std::path::Path;
use std::sync::Arc;

use tch::{Device, Tensor};

use crate::diffusion::{Conditions, Conversion, Denoiser, HostConditions, InputSpec};
use crate::error::{Error, Result};
use crate::graph::Model;
use crate::run::Teacher;
use crate::runtime::student::{SampleRequest, Student, StudentInfo};
use crate::tensor::HostTensor;
use crate::torch::{Forward, ImportOptions, Network, ParamSet, convert};

use super::Reference;

/// The teacher's network with these weights at the noise level where the student starts.
pub fn of_weights(
    teacher: &Teacher,
    params: &ParamSet,
    sigma_init: Option<f64>,
    request: &SampleRequest,
    count: usize,
) -> Result<Reference> {
    let card = &teacher.card.card;
    let network = teacher.network.with_weights(params)?;
    let start = Conversion::new(card)?.at_start(sigma_init)?;
    let specs: Vec<InputSpec> = teacher.inputs();
    let denoiser = Denoiser::new(Box::new(network), Arc::new(card.clone()), &specs)?;
    let mut conditions = HostConditions::of_images(card, request.seed, 0, count);
    if !request.embeddings.is_empty() {
        conditions = HostConditions::new(count, request.embeddings.clone());
    }
    let conditions = conditions?;
    let values = crate::noise::batch_noise(request.seed, 0, count, card.sample_len());
    let samples = tch::no_grad(|| -> Result<HostTensor> {
        let z = Tensor::f_from_slice(&values)?.f_reshape(card.size_of(count))?;
        let x0 = denoiser.generate(&z, &Conditions::from_host(&conditions, Device::Cpu)?, &start)?;
        convert::to_host(&match card.range {
            Some([low, high]) => x0.f_clamp(low, high)?,
            None => x0,
        })
    })?;
    Ok(Reference { name: "the run's weights in libtorch".into(), samples, original_weights: true })
}

/// The file itself, imported into libtorch as a teacher would be.
pub fn file_in_libtorch(path: &Path, info: &StudentInfo, request: &SampleRequest, count: usize) -> Result<HostTensor> {
    let options = ImportOptions { fuse: false, ..ImportOptions::default() };
    let network = Network::import(Model::load(path)?, &options, Device::Cpu)?;
    let inputs = Student::inputs_of(info, request, 0, count)?;
    tch::no_grad(|| {
        let held = inputs.iter().map(|(n, t)| Ok((n.as_str(), convert::to_torch(t)?))).collect::<Result<Vec<_>>>()?;
        let named: Vec<(&str, &Tensor)> = held.iter().map(|(n, t)| (*n, t)).collect();
        let out = network.forward(&named)?;
        let (_, sample) = out
            .into_iter()
            .find(|(n, _)| n == "sample")
            .ok_or_else(|| Error::mismatch("the student has no output `sample`"))?;
        convert::to_host(&sample.f_to_kind(tch::Kind::Float)?)
    })
}
