//! What a run leaves for people to look at while it goes on: pictures of samples and TensorBoard events.

use std::path::{Path, PathBuf};

use crate::diffusion::{Conditions, Denoiser, Guidance, HostConditions, Sampler, TeacherCard};
use crate::distill::backtrack::guidance_of;
use crate::distill::batches;
use crate::distill::metrics::MetricsRow;
use crate::distill::{Config, DebugBatch, Observer, RunDir, Student};
use crate::error::{Context, Error, Result};
use crate::io::{npy, wav};
use crate::report::tfevents::EventWriter;
use crate::report::view::{self, Beneath, View};
use crate::run::divergence;
use crate::runtime::EngineOptions;
use crate::runtime::decoder::Decoder;
use crate::tensor::HostTensor;
use crate::torch::{ParamSet, convert};

/// Tensors of weights that histograms are written of.
const WEIGHTS: usize = 32;

/// Samples that can be listened to.
const SOUNDS: usize = 4;

/// Spread of the teacher's samples.
const SPREAD: &str = "teacher-spread.txt";

/// The teacher's samples, where they are no images.
const TEACHER: &str = "teacher.npy";

/// Writes `samples/*.png` (the same noise and classes in every sheet) and the event file.
pub struct Sheets {
    folder: PathBuf,
    noise: HostTensor,
    /// The student's, where it takes another shape than a sample's.
    student_noise: Option<HostTensor>,
    conditions: HostConditions,
    range: Option<[f64; 2]>,
    decoder: Option<Decoder>,
    /// What the networks' samples are.
    view: View,
    steps: usize,
    /// Time shift of the steps; 0: the card's.
    shift: f64,
    guidance: Guidance,
    /// Images a forward pass.
    batch: usize,
    events: EventWriter,
    /// Spread of the teacher's samples, once they were made.
    teacher_spread: Option<f64>,
    /// Iterations of the stage now running, for the events of images.
    iteration: i64,
}

impl Sheets {
    /// `student`: where it is not the teacher's copy.
    pub fn new(
        run: &RunDir,
        config: &Config,
        card: &TeacherCard,
        student: Option<&Student>,
        decoder: Option<Decoder>,
    ) -> Result<Self> {
        card.schedule()?.with_shift(config.log.sample_shift, "log.sample_shift")?;
        let (count, seed) = (config.log.samples, config.seed);
        let noise = |row: &[usize]| {
            let size: Vec<usize> = std::iter::once(count).chain(row.iter().copied()).collect();
            HostTensor::new(&size, &crate::noise::batch_noise(seed, 0, count, row.iter().product()))
        };
        let own = student.map(Student::noise_shape);
        Ok(Self {
            folder: run.samples(),
            noise: noise(&card.shape)?,
            student_noise: own.filter(|shape| *shape != card.shape).map(|row| noise(&row)).transpose()?,
            conditions: batches::conditions(config, card)?.of_images(card, seed, 0, count)?,
            range: if decoder.is_some() { Some(Decoder::RANGE) } else { card.range },
            decoder,
            view: View::of_card(card),
            steps: config.log.sample_steps,
            shift: config.log.sample_shift,
            guidance: config.target_guidance()?,
            batch: config.batch,
            events: EventWriter::append(run.path())?,
            teacher_spread: crate::files::read_text(&run.samples().join(SPREAD), crate::files::LINE)
                .ok()
                .and_then(|t| t.trim().parse().ok()),
            iteration: 0,
        })
    }

    fn write(
        &mut self,
        name: &str,
        noise: &HostTensor,
        sample: impl Fn(&tch::Tensor, &Conditions) -> Result<tch::Tensor>,
        device: tch::Device,
    ) -> Result<()> {
        if self.conditions.is_empty() {
            return Ok(());
        }
        let z = convert::to_torch(noise)?.f_to_device(device)?;
        let conditions = Conditions::from_host(&self.conditions, device)?;
        let mut parts = Vec::new();
        for start in (0..conditions.len()).step_by(self.batch) {
            let count = (conditions.len() - start).min(self.batch as i64);
            let images = tch::no_grad(|| sample(&z.f_narrow(0, start, count)?, &conditions.rows(start, count)?))?;
            let images = convert::to_host(&images)?;
            if name == "teacher" && start == 0 {
                self.keep_spread(&images)?;
            }
            parts.push(self.images(images)?);
        }
        let all = HostTensor::concat_rows(&parts)?;
        self.events.histogram(&format!("{name}/values"), self.iteration, &all.to_f32())?;
        self.pictures(name, &all)
    }

    /// The spread of the teacher's samples is kept in `samples/`, for processes that go on with the run.
    fn keep_spread(&mut self, samples: &HostTensor) -> Result<()> {
        self.teacher_spread = divergence::spread(samples);
        match self.teacher_spread {
            Some(spread) => crate::files::write_atomic(&self.folder.join(SPREAD), spread.to_string().as_bytes()),
            None => Ok(()),
        }
    }

    /// Share of the teacher's spread that samples of the student have; `None` where there is nothing to compare.
    pub fn share_of_spread(&self, samples: &HostTensor) -> Option<f64> {
        Some(divergence::spread(samples)? / self.teacher_spread.filter(|s| *s > 0.0)?)
    }

    /// What the samples are that are shown: images where a decoder has made them.
    fn view(&self, shown: &HostTensor) -> View {
        match self.decoder {
            Some(_) => View::images(shown.shape().get(1..).unwrap_or_default(), self.range),
            None => self.view.clone(),
        }
    }

    /// Pictures of samples into files and events: a sheet, moving ones of videos, and the first ones of sound to listen to.
    /// Where they are no images, the teacher's samples stay in `samples/teacher.npy`: all later ones are drawn over them.
    fn pictures(&mut self, name: &str, samples: &HostTensor) -> Result<()> {
        let view = self.view(samples);
        let kept = self.folder.join(TEACHER);
        let mut teacher = None;
        if name == "teacher" && !view.is_image() {
            npy::write(&kept, samples)?;
        } else if !view.is_image() && kept.is_file() {
            teacher = Some(npy::read(&kept)?).filter(|t| t.shape().get(1..) == samples.shape().get(1..));
        }
        let own = if name.starts_with("student") { "student" } else { "degraded teacher" };
        let beneath = teacher.as_ref().map(|samples| Beneath { samples, names: [own, "teacher"] });
        let pictures = view::view(samples, beneath, &view, None)?;
        self.sheet(name, &pictures.sheet)?;
        if let Some(moving) = &pictures.animation {
            self.sheet(&format!("{name}-moving"), moving)?;
        }
        if view.check_sound().is_ok() {
            let (sounds, rate) = view.sound(&samples.rows(0, samples.shape()[0].min(SOUNDS))?)?;
            for (k, sound) in sounds.iter().enumerate() {
                let wav = wav::encode(sound.view(), view.range, rate)?;
                crate::files::write_atomic(&self.folder.join(format!("{name}-{k}.wav")), &wav)?;
                let size = [sound.nrows(), sound.ncols()];
                self.events.sound_wav(&format!("{name}/{k}"), self.iteration, &wav, size, rate)?;
            }
        }
        Ok(())
    }

    /// A finished sheet into its file and the events.
    fn sheet(&mut self, name: &str, png: &[u8]) -> Result<()> {
        crate::files::write_atomic(&self.folder.join(format!("{name}.png")), png)?;
        // The PNG's own header says how large it is: width and height, then bits and colour type.
        let number = |at: usize| png.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
        let channels = if png.get(25) == Some(&2) { 3 } else { 1 };
        self.events.image_png(name, self.iteration, png, number(20) as usize, number(16) as usize, channels)
    }

    /// Images of a network's samples, by the decoder where there is one.
    pub fn images(&mut self, samples: HostTensor) -> Result<HostTensor> {
        match &mut self.decoder {
            Some(decoder) => decoder.decode(&samples),
            None => Ok(samples),
        }
    }

    /// C, H, W of [`Sheets::images`] of this teacher's samples.
    ///
    /// Errors: samples that are no images.
    pub fn image_shape(&mut self, card: &TeacherCard) -> Result<[usize; 3]> {
        match (&mut self.decoder, card.image_shape()) {
            (Some(decoder), _) => decoder.image_shape(&card.shape).context("log.decoder"),
            (None, Some(shape)) => Ok(shape),
            (None, None) => Err(Error::usage(format!(
                "evaluate.reference: the teacher's samples are {:?}, which are no images: they are not measured while it is \
                 trained",
                card.shape
            ))
            .hint("leave evaluate.reference out")),
        }
    }

    /// Whether [`Sheets::images`] are images with their channels first: what a feature network of images and the measures on
    /// patches take.
    pub fn makes_images(&self) -> bool {
        self.decoder.is_some() || (self.view.is_image() && self.view.channel_axis == Some(0))
    }

    /// Value range of [`Sheets::images`]; none: latents.
    pub fn range(&self) -> Option<[f64; 2]> {
        self.range
    }

    /// Writes `samples/student-final.png`, samples of the finished student.
    pub fn finished(&mut self, student: &Student) -> Result<()> {
        self.student("student-final", student)
    }

    /// The event file.
    pub fn events(&mut self) -> &mut EventWriter {
        &mut self.events
    }

    /// Writes histograms of the largest weights into the event file.
    pub fn weights(&mut self, name: &str, params: &ParamSet) -> Result<()> {
        let mut tensors: Vec<(&str, &tch::Tensor)> = params.iter().collect();
        tensors.sort_by_key(|(_, t)| std::cmp::Reverse(t.numel()));
        for (weight, tensor) in tensors.into_iter().take(WEIGHTS) {
            let values = convert::to_host(tensor)?.to_f32();
            self.events.histogram(&format!("{name}/{weight}"), self.iteration, &values)?;
        }
        self.events.flush()
    }

    /// Writes `samples/<name>.png`, pictures of the student's samples.
    pub fn student(&mut self, name: &str, student: &Student) -> Result<()> {
        let noise = self.student_noise.as_ref().unwrap_or(&self.noise).clone();
        self.write(name, &noise, |z, conditions| student.generate(z, conditions), student.device())
    }
}

/// The configured decoder of latents, where there is one.
pub fn decoder(config: &Config, card: &TeacherCard) -> Result<Option<Decoder>> {
    let path = Some(Path::new(&config.log.decoder)).filter(|p| !p.as_os_str().is_empty());
    let options = EngineOptions::default();
    path.map(|p| Decoder::open(p, &card.shape, card.latent_scale, &options).context("log.decoder")).transpose()
}

/// Conditions of images `start..start+count` of the run's seed.
pub fn conditions(
    config: &Config,
    card: &TeacherCard,
    start: u64,
    count: usize,
    device: tch::Device,
) -> Result<Conditions> {
    Conditions::from_host(&batches::conditions(config, card)?.of_images(card, config.seed, start, count)?, device)
}

/// Samples of a debug batch that are shown.
const DEBUG_ROWS: i64 = 8;

fn device_of(denoiser: &Denoiser) -> tch::Device {
    denoiser.params().tensors().first().map_or(tch::Device::Cpu, tch::Tensor::device)
}

impl Observer for Sheets {
    fn metrics(&mut self, row: &MetricsRow) -> Result<()> {
        self.iteration = row.iteration as i64;
        let stage = row.stage.name();
        let values = [
            ("loss_fake", row.loss_fake),
            ("loss_generator", row.loss_generator),
            ("grad_norm_fake", row.grad_norm_fake),
            ("grad_norm_generator", row.grad_norm_generator),
            ("mismatch", row.mismatch),
            ("tracking", row.tracking),
            ("loss_gan", row.loss_gan),
            ("loss_discriminator", row.loss_discriminator),
            ("node", Some(row.node as f64)),
            ("lr", Some(row.lr)),
            ("images_per_s", Some(row.images_per_s)),
        ];
        for (name, value) in values {
            if let Some(value) = value {
                self.events.scalar(&format!("{stage}/{name}"), self.iteration, value)?;
            }
        }
        self.events.flush()
    }

    fn node_recorded(&mut self, node: usize, denoiser: &Denoiser) -> Result<()> {
        let (steps, shift, guidance) = (self.steps, self.shift, guidance_of(self.guidance, denoiser, node));
        let name = if node == 0 { "teacher".to_owned() } else { format!("degraded-node-{node:03}") };
        let sample = |z: &tch::Tensor, conditions: &Conditions| {
            Ok(denoiser.sample_shifted(z, conditions, (Sampler::Heun, steps), shift, guidance)?.value)
        };
        self.write(&name, &self.noise.clone(), sample, device_of(denoiser))
    }

    /// The teacher's sheet where no stage 1 has made it: the base method, a trajectory of another run.
    fn target_entered(&mut self, node: usize, target: &Denoiser) -> Result<()> {
        if node > 0 || self.folder.join("teacher.png").is_file() {
            return Ok(());
        }
        self.node_recorded(0, target)
    }

    fn debug_batch(&mut self, node: usize, updates: u64, batch: &DebugBatch) -> Result<()> {
        let rows = batch.x_t.size()[0].min(DEBUG_ROWS);
        let first = |t: &tch::Tensor| -> Result<tch::Tensor> { Ok(t.f_narrow(0, 0, rows)?) };
        let name = format!("inside-node-{node:03}-update-{updates:06}");
        let range = if self.decoder.is_some() { None } else { self.range };
        let view = View { range, ..self.view.clone() };
        if view.is_plot() {
            // x0 by the target, over x0 by the fake score.
            let fake = batch.fake.as_ref().map(|t| convert::to_host(&first(t)?)).transpose()?;
            let beneath = fake.as_ref().map(|samples| Beneath { samples, names: ["target", "fake score"] });
            let pictures = view::view(&convert::to_host(&first(&batch.target)?)?, beneath, &view, None)?;
            return self.sheet(&name, &pictures.sheet);
        }
        // A row a sample (of volumes and videos a row each): x_t, x0 by the target, x0 by the fake score, the gradient; x_t and gradient
        // each scaled to their own largest value.
        let [low, high] = range.unwrap_or([-1.0, 1.0]);
        let (middle, half) = ((low + high) / 2.0, (high - low) / 2.0);
        let scaled = |t: &tch::Tensor| -> Result<tch::Tensor> {
            let dims: Vec<i64> = (1..t.dim() as i64).collect();
            let largest = t.f_abs()?.f_amax(dims.as_slice(), true)?.f_clamp_min(1e-12)?;
            Ok(t.f_div(&largest)?.f_mul_scalar(half)?.f_add_scalar(middle)?)
        };
        let mut parts = vec![scaled(&batch.x_t)?, batch.target.shallow_clone()];
        parts.extend(batch.fake.as_ref().map(tch::Tensor::shallow_clone));
        parts.push(scaled(&batch.gradient)?);
        let columns = view.is_image().then_some(parts.len());
        let cut = parts.iter().map(first).collect::<Result<Vec<_>>>()?;
        let samples = convert::to_host(&tch::Tensor::f_stack(&cut, 1)?.f_flatten(0, 1)?)?;
        self.sheet(&name, &view::view(&samples, None, &view, columns)?.sheet)
    }

    fn target_left(&mut self, node: usize, student: &Student) -> Result<()> {
        self.student(&format!("student-node-{node:03}"), student)
    }
}
