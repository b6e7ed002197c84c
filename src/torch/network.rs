//! A network: a shared plan and one set of parameters.

use tch::Tensor;

use crate::error::Result;
use crate::torch::params::ParamSet;

/// What the method needs of a network: named inputs in, named outputs out, and its parameters.
pub trait Forward {
    /// Runs the network on named inputs (any order); outputs in the order of the graph. Differentiable with respect to
    /// the inputs and to the parameters that require a gradient.
    fn forward(&self, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>>;
    /// The parameters of this copy.
    fn params(&self) -> &ParamSet;
    /// Another copy: the same plan, its own parameters with equal values.
    fn copy(&self) -> Result<Box<dyn Forward>>;
}

/// An imported ONNX graph with its own parameters.
#[derive(Debug)]
pub struct Network {}
