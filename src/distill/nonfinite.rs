//! Finds the network that gives NaN or infinity where gradients stay so. Asked once, when a run gives up: it reads the device.

use tch::{Kind, Tensor};

use crate::diffusion::{Conditions, Denoiser, Guidance};
use crate::distill::batches::Batches;
use crate::distill::draws::{Draws, Levels, Purpose};
use crate::distill::gan::Gan;
use crate::distill::student::Student;
use crate::error::Result;
use crate::torch::convert::column;

/// Noise levels that a network is tried at, at least.
const TRIED: usize = 32;
/// Images beyond this are no images.
const LARGEST: f64 = 1e4;

/// What was found, and what to do.
#[derive(Debug)]
pub(crate) struct Finding {
    pub found: String,
    pub hint: String,
}

/// A denoiser to try, its name, and what to do where it is at fault.
pub(super) struct Candidate<'a> {
    pub name: String,
    pub network: &'a Denoiser,
    pub levels: &'a Levels,
    pub guidance: Guidance,
    pub hint: &'static str,
}

/// What the search needs: the data of a step and the networks that are no denoisers.
pub(super) struct Probe<'a> {
    pub batches: &'a Batches,
    pub draws: &'a Draws,
    pub student: &'a Student,
    /// What to do about a student whose images are not finite.
    pub hint: &'static str,
    /// The discriminator and the fake score whose features it reads.
    pub judge: Option<(&'a Gan, &'a Denoiser)>,
}

/// What to do about a teacher that overflows.
pub(super) const TEACHER: &str = "keep to noise levels that it knows (noise.generator, noise.fake), or export it anew: \
                                  `disback parity` shows where it overflows";

impl Probe<'_> {
    /// The first of `candidates` that gives NaN or infinity for plain noise of some level, else the student where its images
    /// are at fault. `None`: each network gives numbers, and the gradient overflows on its way back.
    pub fn find_nonfinite(&self, candidates: &[Candidate]) -> Result<Option<Finding>> {
        tch::no_grad(|| {
            // (A weaker network that guides is the first, and may know fewer conditions than the others.)
            let Some(last) = candidates.last() else { return Ok(None) };
            let conditions = self.batches.conditions(self.draws, last.network)?;
            for candidate in candidates {
                if let Some(found) = self.tried(candidate, &conditions)? {
                    return Ok(Some(Finding { found, hint: candidate.hint.into() }));
                }
            }
            let z = self.batches.latent(self.draws, self.student)?;
            let images = self.student.training_images(self.draws, &z, &conditions)?.f_abs()?;
            let largest = images.f_max()?.f_double_value(&[])?;
            let found = match largest {
                l if !l.is_finite() => {
                    let weights = match all_finite(self.student.params().tensors())? {
                        true => "from weights that are finite",
                        false => "and so are its weights",
                    };
                    format!("the student's images are NaN or infinite, {weights}")
                }
                l if l > LARGEST => format!("the student has diverged: its images reach {l:.1e}"),
                _ => return self.judged(&conditions),
            };
            Ok(Some(Finding { found, hint: self.hint.into() }))
        })
    }

    /// The discriminator's head, where what it says of noise is not finite.
    fn judged(&self, conditions: &Conditions) -> Result<Option<Finding>> {
        let Some((gan, fake)) = self.judge else { return Ok(None) };
        let sigmas = self.batches.fake_levels.spread(self.batches.batch);
        let noise = self.batches.noise(self.draws, Purpose::GeneratorNoise)?;
        let x_t = noise.f_mul(&column(&sigmas, noise.dim() - 1, self.batches.device)?)?;
        let (_, features) = fake.denoise_tapped(&x_t, &sigmas, conditions, gan.taps())?;
        let found = "the discriminator's head gives NaN or infinity".to_owned();
        let hint = "it has diverged: a lower gan.lr, or a smaller gan.weight_discriminator".into();
        Ok((!all_finite(&[gan.logits(&features)?])?).then_some(Finding { found, hint }))
    }

    fn tried(&self, candidate: &Candidate, conditions: &Conditions) -> Result<Option<String>> {
        let batch = self.batches.batch;
        let count = TRIED.div_ceil(batch) * batch;
        let noise = self.batches.noise(self.draws, Purpose::GeneratorNoise)?;
        let mut bad = Vec::new();
        for sigmas in candidate.levels.spread(count).chunks(batch) {
            let x_t = noise.f_mul(&column(sigmas, noise.dim() - 1, self.batches.device)?)?;
            let x0 = candidate.network.guided(&x_t, sigmas, conditions, candidate.guidance)?;
            let finite = x0.f_flatten(1, -1)?.f_isfinite()?.f_all_dim(1, false)?;
            let finite = Vec::<bool>::try_from(finite.f_to_device(tch::Device::Cpu)?)?;
            bad.extend(sigmas.iter().zip(finite).filter(|(_, ok)| !ok).map(|(s, _)| *s));
        }
        let name = &candidate.name;
        Ok(match (bad.iter().copied().reduce(f64::min), bad.iter().copied().reduce(f64::max)) {
            (Some(_), Some(_)) if bad.len() == count => {
                Some(format!("{name} gives NaN or infinity at every noise level tried"))
            }
            (Some(low), Some(high)) => Some(format!(
                "{name} gives NaN or infinity at noise levels from {low:.4} to {high:.4}, {} of {count} tried",
                bad.len()
            )),
            _ => None,
        })
    }
}

fn all_finite(tensors: &[Tensor]) -> Result<bool> {
    for t in tensors {
        if t.f_isfinite()?.f_all()?.f_to_kind(Kind::Float)?.f_double_value(&[])? == 0.0 {
            return Ok(false);
        }
    }
    Ok(true)
}
