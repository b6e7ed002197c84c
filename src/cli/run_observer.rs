//! What a run leaves for people to look at while it goes on: sample sheets and TensorBoard events.

use std::path::PathBuf;

use crate::diffusion::{Conditions, Denoiser, HostConditions, Sampler, TeacherCard};
use crate::distill::metrics::Row;
use crate::distill::{Config, Observer, RunDir, Student};
use crate::error::Result;
use crate::report::grid;
use crate::report::tfevents::EventWriter;
use crate::tensor::HostTensor;
use crate::torch::convert;

/// Writes `samples/*.png` (the same noise and classes in every sheet) and the event file.
pub struct Sheets {
    folder: PathBuf,
    noise: HostTensor,
    conditions: Option<HostConditions>,
    range: Option<[f64; 2]>,
    steps: usize,
    guidance: f64,
    /// Images a forward pass.
    batch: usize,
    events: EventWriter,
    /// Iterations of the stage now running, for the events of images.
    iteration: i64,
}

impl Sheets {
    pub fn new(run: &RunDir, config: &Config, card: &TeacherCard) -> Result<Self> {
        let (count, seed) = (config.log.samples, config.seed);
        let [c, h, w] = card.shape;
        let noise = HostTensor::new(&[count, c, h, w], &crate::noise::batch_noise(seed, 0, count, c * h * w))?;
        Ok(Self {
            folder: run.samples(),
            noise,
            // Embeddings cannot be drawn: such a teacher gets no sheets.
            conditions: HostConditions::of_images(card, seed, 0, count).ok(),
            range: card.range,
            steps: config.log.sample_steps,
            guidance: config.guidance,
            batch: config.batch,
            events: EventWriter::append(run.path())?,
            iteration: 0,
        })
    }

    fn write(
        &mut self,
        name: &str,
        sample: impl Fn(&tch::Tensor, &Conditions) -> Result<tch::Tensor>,
        device: tch::Device,
    ) -> Result<()> {
        let Some(conditions) = self.conditions.as_ref().filter(|c| !c.is_empty()) else { return Ok(()) };
        let z = convert::to_torch(&self.noise)?.f_to_device(device)?;
        let conditions = Conditions::from_host(conditions, device)?;
        let mut parts = Vec::new();
        for start in (0..conditions.len()).step_by(self.batch) {
            let count = (conditions.len() - start).min(self.batch as i64);
            let images = tch::no_grad(|| sample(&z.f_narrow(0, start, count)?, &conditions.rows(start, count)?))?;
            parts.push(convert::to_host(&images)?);
        }
        let png = grid::png(&HostTensor::concat_rows(&parts)?, self.range, None)?;
        crate::files::write_atomic(&self.folder.join(format!("{name}.png")), &png)?;
        // The PNG's own header says how large it is: width and height, then bits and colour type.
        let number = |at: usize| png.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
        let channels = if png.get(25) == Some(&2) { 3 } else { 1 };
        self.events.image_png(name, self.iteration, &png, number(20) as usize, number(16) as usize, channels)
    }

    /// The finished student's sheet.
    pub fn finished(&mut self, student: &Student) -> Result<()> {
        self.student("student-final", student)
    }

    fn student(&mut self, name: &str, student: &Student) -> Result<()> {
        let device = device_of(student.denoiser());
        self.write(name, |z, conditions| student.generate(z, conditions), device)
    }
}

fn device_of(denoiser: &Denoiser) -> tch::Device {
    denoiser.params().tensors().first().map_or(tch::Device::Cpu, tch::Tensor::device)
}

impl Observer for Sheets {
    fn metrics(&mut self, row: &Row) -> Result<()> {
        self.iteration = row.iteration as i64;
        let stage = row.stage.name();
        let values = [
            ("loss_fake", row.loss_fake),
            ("loss_generator", row.loss_generator),
            ("grad_norm_fake", row.grad_norm_fake),
            ("grad_norm_generator", row.grad_norm_generator),
            ("mismatch", row.mismatch),
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
        let (steps, guidance) = (self.steps, self.guidance);
        let name = if node == 0 { "teacher".to_owned() } else { format!("degraded-node-{node:03}") };
        let sample = |z: &tch::Tensor, conditions: &Conditions| {
            Ok(denoiser.sample(z, conditions, Sampler::Heun, steps, guidance)?.value)
        };
        self.write(&name, sample, device_of(denoiser))
    }

    fn target_left(&mut self, node: usize, student: &Student) -> Result<()> {
        self.student(&format!("student-node-{node:03}"), student)
    }
}
