//! What a request for samples asks for: the query, the body, and the inputs of the network that follow from both.

use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use serde::Deserialize;

use super::batcher::Rows;
use super::body::{self, Given};
use super::failure;
use crate::error::{Error, Kind};
use crate::runtime::student::{SampleRequest, Student, StudentInfo};

/// What may be asked of `/sample`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    #[serde(default)]
    seed: u64,
    /// Number of the first image of the seed.
    #[serde(default)]
    index: u64,
    /// Images.
    n: Option<usize>,
    /// Classes of the images in turn, by commas.
    #[serde(default)]
    classes: String,
    /// Name of the model, where several are served.
    pub(super) model: Option<String>,
    /// `png` or `npy`; by the Accept header where absent.
    format: Option<String>,
}

/// A request that can be computed.
#[derive(Debug)]
pub(super) struct Ask {
    pub inputs: Vec<(String, Rows)>,
    pub count: usize,
    pub npy: bool,
}

impl Ask {
    /// Bytes that it holds until it is answered: its inputs, its samples as f32 and the answer's body.
    pub fn bytes(&self, info: &StudentInfo) -> u64 {
        let inputs: usize = self.inputs.iter().map(|(_, rows)| rows.bytes()).sum();
        let samples = self.count * info.shape.iter().product::<usize>() * 4;
        (inputs + 3 * samples) as u64
    }
}

/// Limits of one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Most {
    /// Images.
    pub images: usize,
    /// Bytes of a body, as sent and as unpacked.
    pub body: usize,
}

/// Bytes that reading this body takes at most, itself included: numbers in JSON become f64 and then the input's type, archives
/// unpack to as many bytes as a body may have.
pub(super) fn bytes_to_read(body: &[u8], most: usize) -> u64 {
    let held = body.len() as u64;
    match body.iter().find(|b| !b.is_ascii_whitespace()) {
        None => 0,
        Some(b'{') => 8 * held,
        Some(_) if body.starts_with(b"PK") => held + 3 * most as u64,
        Some(_) => 3 * held,
    }
}

/// The request behind a query and a body. The error is the answer.
#[allow(clippy::result_large_err, reason = "one a request, and the error is its answer")]
pub(super) fn read(
    info: &StudentInfo,
    most: Most,
    headers: &HeaderMap,
    w: &Wanted,
    body: &Bytes,
) -> Result<Ask, Response> {
    let bad = |text: &str| failure(StatusCode::BAD_REQUEST, text);
    let refused = |e: Error| match e.kind() {
        Kind::Usage | Kind::Mismatch => bad(&e.to_string()),
        _ => failure(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
    };
    let npy = format(info, headers, w)?;
    let classes = w.classes.split(',').filter(|c| !c.trim().is_empty()).map(|c| c.trim().parse::<usize>());
    let classes = classes
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| bad(&format!("classes={}: expected numbers by commas", w.classes)))?;
    let given = Given::read(body, info, most.body).map_err(|e| bad(&e.to_string()))?;
    let count = match (given.count().map_err(|e| bad(&e.to_string()))?, w.n) {
        (Some(held), Some(n)) if n != held => {
            let what = if given.noise.is_some() { "noise" } else { "rows" };
            return Err(bad(&format!("n={n}, but the body holds {what} for {held} images")));
        }
        (Some(held), _) => held,
        (None, n) => n.unwrap_or(1),
    };
    if count == 0 {
        return Err(bad("n=0: expected 1 or more"));
    }
    if count > most.images {
        let text = format!("{count} images in one request, at most {} are made", most.images);
        return Err(failure(StatusCode::PAYLOAD_TOO_LARGE, &text));
    }
    if w.index.checked_add(count as u64).is_none() {
        return Err(bad(&format!("index={} and n={count}: there are 2^64 images of a seed", w.index)));
    }
    if let Some(missing) = info.embeddings().find(|c| !given.rows.iter().any(|(n, _)| *n == c.input.name)) {
        return Err(bad(&format!(
            "the student wants rows for its condition `{}`, {}: POST an .npz archive or a JSON object with an array of that name",
            missing.input.name,
            body::wanted(&missing.input)
        )));
    }
    let request = SampleRequest { seed: w.seed, classes, batch: most.images, ..SampleRequest::default() };
    let mut drawn = Student::drawn_inputs(info, &request, w.index, count).map_err(refused)?;
    if let Some(noise) = given.noise
        && let Some((_, drawn)) = drawn.iter_mut().find(|(name, _)| name == "noise")
    {
        *drawn = noise;
    }
    let mut inputs: Vec<(String, Rows)> = drawn.into_iter().map(|(name, t)| (name, Rows::Each(t))).collect();
    inputs.extend(given.rows.into_iter().map(|(name, t)| {
        // Rows are for the images of this request, whichever numbers of the seed these have; a single one is for all.
        let each = t.shape()[0] == count;
        (name, if each { Rows::Each(t) } else { Rows::InTurn(t, 0) })
    }));
    Ok(Ask { inputs, count, npy })
}

/// Whether the answer is a .npy array, or else a PNG.
#[allow(clippy::result_large_err, reason = "one a request, and the error is its answer")]
fn format(info: &StudentInfo, headers: &HeaderMap, w: &Wanted) -> Result<bool, Response> {
    let bad = |text: &str| failure(StatusCode::BAD_REQUEST, text);
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("");
    let npy = match w.format.as_deref() {
        Some("npy") => true,
        Some("png") => false,
        Some(other) => return Err(bad(&format!("format={other}: expected png or npy"))),
        None => accept.contains("npy") || accept.contains("octet-stream"),
    };
    if !npy && info.image_shape().is_none() {
        return Err(bad("the student's samples are no images: ask for format=npy"));
    }
    if !npy && info.range.is_none() {
        return Err(bad("the student makes latents, which are no images: ask for format=npy"));
    }
    Ok(npy)
}
