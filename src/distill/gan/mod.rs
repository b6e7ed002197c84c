//! The diffusion GAN of DMD2 (Yin et al. 2024): a discriminator that sees real and generated images through the features
//! of the fake score at random noise levels.

mod data;
mod head;
pub mod taps;

use std::path::Path;

use tch::{Kind, Tensor};

use crate::axes::written;
use crate::diffusion::{Conditions, Denoiser};
use crate::distill::batches::{self, Batches};
use crate::distill::config::{Config, Distribution};
use crate::distill::draws::{Draws, Levels, Purpose};
use crate::error::{Error, Result};
use crate::torch::convert::column;
use crate::torch::train::optim::AdamW;
use crate::torch::{ParamSet, convert};

pub use data::RealImages;
pub use head::{Axes, Head};

/// The discriminator's head, its optimiser and the real images.
#[derive(Debug)]
pub struct Gan {
    head: Head,
    /// Optimiser of the head.
    pub adam: AdamW,
    data: RealImages,
    taps: Vec<String>,
    levels: Levels,
    shared_pass: bool,
    weight_generator: f64,
    weight_discriminator: f64,
}

impl Gan {
    /// What is worth knowing of the data, such as files that were passed over.
    pub fn notes(&self) -> &[String] {
        self.data.notes()
    }

    /// The configured discriminator for copies of this teacher; `None` where there is none.
    ///
    /// Errors: data that cannot be read or do not fit the teacher, taps that the graph does not have.
    pub fn new(config: &Config, teacher: &Denoiser, batches: &Batches) -> Result<Option<Self>> {
        if config.gan.data.is_empty() {
            return Ok(None);
        }
        let card = teacher.card();
        let data =
            RealImages::open(Path::new(&config.gan.data), card, config.gan.said_range()?, config.data.skip_broken)?;
        // One forward pass tells the features' shapes.
        let draws = Draws::new(config.seed, crate::distill::draws::Phase::Probe, 0, 0);
        let conditions = batches.conditions(&draws, teacher)?;
        let x = batches.noise(&draws, Purpose::Latent)?;
        let sigmas = vec![batches.generator_levels.spread(1)[0]; batches.batch];
        let tapped = |taps: &[String]| -> Result<Vec<Tensor>> {
            Ok(tch::no_grad(|| teacher.denoise_tapped(&x, &sigmas, &conditions, taps))?.1)
        };
        let possible = || tappable(teacher, batches.batch as i64, tapped);
        if config.gan.taps.is_empty() {
            return Err(Error::usage("gan.taps is empty: the discriminator needs the features of one tensor at least")
                .hint(possible()));
        }
        let resolved = taps::resolve(&config.gan.taps, teacher).map_err(|e| e.also(possible()))?;
        let taps: Vec<String> = resolved.into_iter().map(|tap| tap.name).collect();
        let features = tapped(&taps).map_err(|e| e.also(possible()))?;
        let shapes: Vec<(String, Vec<i64>)> = taps.iter().cloned().zip(features.iter().map(Tensor::size)).collect();
        let head = Head::new(config.gan.head, &shapes, &Axes::of(card), config.seed, batches.device)
            .map_err(|e| e.also(possible()))?;
        head.params().set_requires_grad(true)?;
        let (table, discrete) = batches::table(config, card)?;
        let levels = Levels::new(&config.noise, Distribution::Table, config.gan.levels, &table, discrete);
        Ok(Some(Self {
            adam: AdamW::new(head.params(), config.adamw(config.gan.lr, &config.backtrack.betas_fake))?,
            head,
            data,
            taps,
            levels,
            shared_pass: config.gan.shared_pass,
            weight_generator: config.gan.weight_generator,
            weight_discriminator: config.gan.weight_discriminator,
        }))
    }

    /// Trained weights of the head.
    pub fn params(&self) -> &ParamSet {
        self.head.params()
    }

    /// Names of the tensors that the discriminator reads.
    pub fn taps(&self) -> &[String] {
        &self.taps
    }

    /// Logits `[B]` or `[B, places]` of features that were tapped at [`Gan::taps`].
    pub fn logits(&self, features: &[Tensor]) -> Result<Tensor> {
        self.head.logits(features)
    }

    /// `log p_data / p_generator` by the discriminator, `[B, 1, ...]` of `rank` axes: the mean of each sample's logits.
    pub fn log_ratio(&self, features: &[Tensor], rank: usize) -> Result<Tensor> {
        let logits = self.logits(features)?;
        let mut column = vec![1; rank];
        column[0] = logits.size()[0];
        Ok(logits.f_reshape([column[0], -1])?.f_mean_dim([1i64].as_slice(), false, Kind::Float)?.f_view(&column[..])?)
    }

    /// Whether the generator's samples are judged in the objective's own pass of the fake score.
    pub fn shares_pass(&self) -> bool {
        self.shared_pass
    }

    /// The generator's loss `w_g mean softplus(-l)` of features that carry the generator's graph.
    pub fn loss_of(&self, features: &[Tensor]) -> Result<Tensor> {
        Ok(softplus(&self.logits(features)?.f_neg()?)?.f_mul_scalar(self.weight_generator)?)
    }

    fn judge(&self, network: &Denoiser, x0: &Tensor, sigmas: &[f64], noise: &Tensor, c: &Conditions) -> Result<Tensor> {
        let x_t = x0.f_add(&noise.f_mul(&column(sigmas, network.card().rank(), x0.device())?)?)?;
        let (_, features) = network.denoise_tapped(&x_t, sigmas, c, &self.taps)?;
        self.logits(&features)
    }

    /// The generator's loss against the discriminator, `w_g mean softplus(-l(x_t))`. The caller must have frozen the
    /// network's and the head's parameters.
    pub fn generator_loss(
        &self,
        network: &Denoiser,
        batches: &Batches,
        draws: &Draws,
        x0: &Tensor,
        conditions: &Conditions,
    ) -> Result<Tensor> {
        let sigmas = draws.sigmas(Purpose::GanSigma, &self.levels, batches.batch);
        let noise = batches.noise(draws, Purpose::GanNoise)?;
        let logits = self.judge(network, x0, &sigmas, &noise, conditions)?;
        Ok(softplus(&logits.f_neg()?)?.f_mul_scalar(self.weight_generator)?)
    }

    /// The discriminator's loss, `w_d [mean softplus(l(fake)) + mean softplus(-l(real))]` on the same noise levels,
    /// with a gradient to the network as well as to the head.
    pub fn discriminator_loss(
        &self,
        network: &Denoiser,
        batches: &Batches,
        draws: &Draws,
        x0: &Tensor,
        conditions: &Conditions,
    ) -> Result<Tensor> {
        let rows = batches.batch;
        let (images, real_conditions) = self.data.draw(network.card(), &mut draws.stream(Purpose::RealImage), rows)?;
        let images = crate::torch::device::send(&convert::to_torch(&images)?, batches.device)?;
        let real_conditions = Conditions::from_host(&real_conditions, batches.device)?;
        let sigmas = draws.sigmas(Purpose::DiscriminatorSigma, &self.levels, rows);
        let noise = [Purpose::DiscriminatorNoise, Purpose::RealNoise].map(|what| batches.noise(draws, what));
        let [fake_noise, real_noise] = noise;
        let both = self.judge(
            network,
            &Tensor::f_cat(&[&x0.detach(), &images], 0)?,
            &[sigmas.as_slice(), sigmas.as_slice()].concat(),
            &Tensor::f_cat(&[fake_noise?, real_noise?], 0)?,
            &Conditions::cat(&[conditions, &real_conditions])?,
        )?;
        let fake = softplus(&both.f_narrow(0, 0, rows as i64)?)?;
        let real = softplus(&both.f_narrow(0, rows as i64, rows as i64)?.f_neg()?)?;
        Ok(fake.f_add(&real)?.f_mul_scalar(self.weight_discriminator)?)
    }
}

/// `mean ln(1 + exp(x))`.
fn softplus(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_softplus()?.f_mean(Kind::Float)?)
}

/// Tensors that a head can read, from input to output, with their shapes: some of them, where there are many. `tapped` gives the
/// values of tensors by their names.
fn tappable(teacher: &Denoiser, rows: i64, tapped: impl Fn(&[String]) -> Result<Vec<Tensor>>) -> String {
    const SHOWN: usize = 16;
    let card = teacher.card();
    let places = teacher.network().places(&card.sample, &card.output).all;
    let names = match places.is_empty() {
        true => teacher.network().tap_names(),
        false => places.into_iter().map(|place| place.name).collect(),
    };
    let Some(last) = names.len().checked_sub(1) else { return "this network has no named tensors inside".into() };
    // (Twice as many as are shown: half of them may be of another kind.)
    let count = names.len().min(2 * SHOWN);
    let some: Vec<String> = (0..count).map(|k| names[last * k / (count - 1).max(1)].clone()).collect();
    let float = |t: &Tensor| matches!(t.kind(), Kind::Float | Kind::BFloat16 | Kind::Half);
    let fits = |t: &Tensor| (2..=5).contains(&t.dim()) && t.size()[0] == rows && float(t);
    let shown: Vec<String> = match tapped(&some) {
        Ok(values) => {
            let fitting = some.iter().zip(&values).filter(|(_, t)| fits(t));
            let rows = |t: &Tensor| t.size()[1..].iter().map(|n| *n as usize).collect::<Vec<_>>();
            fitting.map(|(name, t)| format!("`{name}` {}", written(&rows(t)))).collect()
        }
        // What cannot be shown with its shape has a name.
        Err(_) => some.iter().map(|name| format!("`{name}`")).collect(),
    };
    let step = shown.len().div_ceil(SHOWN).max(1);
    let shown: Vec<String> = shown.into_iter().step_by(step).collect();
    format!(
        "what can be tapped, from input to output: {} ({} of {} tensors)",
        shown.join(", "),
        shown.len(),
        names.len()
    )
}
