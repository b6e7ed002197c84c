//! What can be compared: a folder, an array, a student, or reference statistics.

use std::path::Path;

use super::Statistics;
use crate::error::{Error, Result};
use crate::io::ImageSet;
use crate::runtime::EngineOptions;
use crate::runtime::student::{Request, Student};
use crate::tensor::HostTensor;

/// One side of a comparison.
pub enum Source {
    Images(ImageSet),
    Student(Box<Student>),
    /// Mean and covariance only: good for the Frechet distance alone.
    Statistics(Statistics),
}

impl Source {
    /// `student.onnx`, a folder of PNG files, a `.npy`, a `.npz` of images, or a `.npz` with `mu` and `sigma`.
    pub fn open(path: &Path, range: [f64; 2], options: &EngineOptions) -> Result<Self> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
        if extension == "onnx" {
            return Ok(Self::Student(Box::new(Student::open(path, options)?)));
        }
        if extension == "npz" && path.is_file() {
            let names: Vec<String> = crate::io::npy::read_npz(path)?.into_iter().map(|(n, _)| n).collect();
            if ["mu", "sigma"].iter().all(|k| names.iter().any(|n| n == k)) {
                return Ok(Self::Statistics(Statistics::read(path)?));
            }
        }
        Ok(Self::Images(ImageSet::open(path, range)?))
    }

    /// Number of images, where the source has a number of its own.
    pub fn len(&self) -> Option<usize> {
        match self {
            Self::Images(set) => Some(set.len()),
            Self::Student(_) | Self::Statistics(_) => None,
        }
    }
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }
}

/// `count` images of a student as an image set.
pub fn sample_images(
    student: &mut Student,
    request: &Request,
    count: usize,
    mut seen: impl FnMut(usize),
) -> Result<ImageSet> {
    let range = student.info().range.ok_or_else(|| {
        Error::mismatch("the student makes latents, which are no images")
            .hint("decode its samples and compare the decoded images")
    })?;
    let batch = request.batch.max(1);
    let mut parts = Vec::new();
    for start in (0..count).step_by(batch) {
        let rows = batch.min(count - start);
        let samples = student.sample(request, start as u64, rows)?;
        parts.push(ImageSet::from_samples(samples, range)?.batch_u8(0, rows)?);
        seen(rows);
    }
    ImageSet::from_samples(HostTensor::concat_rows(&parts)?, [0.0, 255.0])
}
