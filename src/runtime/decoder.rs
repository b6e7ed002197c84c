//! An autoencoder's decoder as ONNX: latents to images, for previews and evaluation of latent models.

use std::path::Path;

use super::{Dim, Engine, EngineOptions, open, run_batched, student};
use crate::error::{Context, Error, Result};
use crate::onnx::ModelProto;
use crate::tensor::HostTensor;

/// By what latents are divided before a decoder takes them: the card's `latent_scale` (0.18215 for Stable Diffusion). A decoder whose
/// metadata hold `disback.decoder.takes = samples` does that itself, and adds the shift that some autoencoders have.
pub fn divisor(decoder: &ModelProto, latent_scale: f64) -> f64 {
    match student::metadata(decoder).get("decoder.takes").map(String::as_str) {
        Some("samples") => 1.0,
        _ => latent_scale,
    }
}

/// A network of one input, the latents `[N, C, h, w]`, and one output, the images in [-1, 1].
pub struct Decoder {
    engine: Box<dyn Engine>,
    input: String,
    /// See [`divisor`].
    scale: f64,
}

impl Decoder {
    /// Values of the images that come out.
    pub const RANGE: [f64; 2] = [-1.0, 1.0];

    /// Opens a decoder for latents of this shape (C, h, w), `scale` being the card's `latent_scale`.
    ///
    /// Errors: latents of another rank, a graph that does not take them.
    pub fn open(path: &Path, shape: &[usize], scale: f64, options: &EngineOptions) -> Result<Self> {
        let run = || -> Result<Self> {
            let engine = open(path, options)?;
            let [input] = engine.inputs() else {
                let names: Vec<_> = engine.inputs().iter().map(|i| format!("`{}`", i.name)).collect();
                return Err(Error::usage(format!("a decoder has one input, this graph has {}", names.join(", "))));
            };
            let &[_, _, _] = shape else {
                return Err(Error::usage(format!(
                    "a decoder makes images of latents [C, h, w]; the samples are {shape:?}, which no decoder is for"
                )));
            };
            let fits = input.shape.len() == 4
                && input.shape[1..].iter().zip(shape).all(|(d, s)| !matches!(d, Dim::Fixed(n) if n != s));
            if !fits {
                return Err(Error::usage(format!("the decoder wants {input}, the latents are {shape:?}")));
            }
            let scale = divisor(&student::decode(&crate::files::map(path)?)?, scale);
            Ok(Self { input: input.name.clone(), engine, scale })
        };
        run().with_context(|| path.display().to_string())
    }

    /// C, H, W of the images of latents of this shape, seen on one of zeros.
    pub fn image_shape(&mut self, shape: &[usize]) -> Result<[usize; 3]> {
        let size: Vec<usize> = std::iter::once(1).chain(shape.iter().copied()).collect();
        let images = self.decode(&HostTensor::new(&size, &vec![0f32; shape.iter().product()])?)?;
        match images.shape() {
            [1, c, h, w] => Ok([*c, *h, *w]),
            other => Err(Error::mismatch(format!("the decoder makes {other:?} of one latent, expected [1, C, H, W]"))),
        }
    }

    /// Images `[N, C, H, W]` of latents `[N, C, h, w]`, a few at a time: decoders are large.
    pub fn decode(&mut self, latents: &HostTensor) -> Result<HostTensor> {
        let scaled: Vec<f32> = latents.to_f32().iter().map(|v| v / self.scale as f32).collect();
        let dtype = self.engine.inputs()[0].dtype;
        let given = HostTensor::new(latents.shape(), &scaled)?.cast(dtype);
        let outputs = run_batched(self.engine.as_mut(), &[(self.input.as_str(), &given)], 4)?;
        let (_, images) = outputs.into_iter().next().ok_or_else(|| Error::backend("the decoder has no output"))?;
        Ok(images.cast(crate::tensor::DType::F32))
    }
}

#[cfg(all(test, any(feature = "ort", feature = "tract")))]
mod tests {
    use super::*;
    use crate::onnx::GraphProto;
    use crate::runtime::testing::{model, node, value};
    use crate::tensor::DType;

    #[test]
    fn latents_are_divided_by_the_scale_and_must_fit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("decoder.onnx");
        let graph = GraphProto {
            node: vec![node("Tanh", &["z"], "image")],
            input: vec![value("z", DType::F32, &["N", "4", "h", "w"])],
            output: vec![value("image", DType::F32, &["N", "4", "h", "w"])],
            ..Default::default()
        };
        std::fs::write(&path, model(graph.clone(), &[])).unwrap();
        let options = EngineOptions::default();
        let latents: Vec<f32> = (0..5 * 4 * 6).map(|v| v as f32 * 0.01 - 0.5).collect();
        let latents = HostTensor::new(&[5, 4, 2, 3], &latents).unwrap();
        let mut decoder = Decoder::open(&path, &[4, 2, 3], 0.25, &options).unwrap();
        assert_eq!(decoder.image_shape(&[4, 2, 3]).unwrap(), [4, 2, 3]);
        let images = decoder.decode(&latents).unwrap();
        assert_eq!(images.shape(), [5, 4, 2, 3]);
        for (image, latent) in images.to_f32().iter().zip(latents.to_f32()) {
            assert!((image - (latent / 0.25).tanh()).abs() < 1e-5);
        }
        // One that scales by itself is given the samples as they are.
        let whole = dir.path().join("whole.onnx");
        std::fs::write(&whole, model(graph, &[("disback.decoder.takes", "samples")])).unwrap();
        let images = Decoder::open(&whole, &[4, 2, 3], 0.25, &options).unwrap().decode(&latents).unwrap();
        for (image, latent) in images.to_f32().iter().zip(latents.to_f32()) {
            assert!((image - latent.tanh()).abs() < 1e-5);
        }
        let Err(e) = Decoder::open(&path, &[3, 2, 3], 1.0, &options) else { panic!("three channels for four") };
        assert!(e.exit_code() == 2 && e.to_string().contains("decoder.onnx"), "{e}");
        let Err(e) = Decoder::open(&path, &[4, 2], 1.0, &options) else { panic!("a sequence") };
        assert!(e.exit_code() == 2 && e.to_string().contains("the samples are [4, 2]"), "{e}");
    }
}
