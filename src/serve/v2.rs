//! The Open Inference Protocol (version 2 of KServe's and Triton's HTTP interface): what a model takes and gives, and calls with
//! tensors as JSON or as bytes after it (Triton's binary tensor extension).
//!
//! Inputs that follow from a seed, noise and classes, may be left out: the request's parameters `seed`, `index` and `n` draw them as
//! `/sample` does.

mod wire;

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Router, http::header};
use serde_json::json;

use super::ask::{Ask, bytes_to_read};
use super::batcher::Rows;
use super::model::Model;
use super::{Answer, Service, answer, body, busy, failure, late, received};
use crate::error::{Error, Kind, Result};
use crate::runtime::student::{ConditionKind, SampleRequest, Student, StudentInfo};
use crate::runtime::{Dim, ValueInfo};
use crate::tensor::HostTensor;

use wire::Wanted;

/// A student file is one version of one model.
const VERSION: &str = "1";
/// The output of every student.
const OUTPUT: &str = "sample";
/// Says how many bytes of a body are JSON, where tensors follow it.
pub(super) const HEAD_LENGTH: &str = "inference-header-content-length";

/// The pages below `/v2`, but for health.
pub(super) fn pages() -> Router<Arc<Service>> {
    Router::new()
        .route("/v2", get(server))
        .route("/v2/repository/index", post(index))
        .route("/v2/models/{name}", get(model))
        .route("/v2/models/{name}/ready", get(ready))
        .route("/v2/models/{name}/infer", post(infer))
        .route("/v2/models/{name}/versions/{version}", get(model))
        .route("/v2/models/{name}/versions/{version}/ready", get(ready))
        .route("/v2/models/{name}/versions/{version}/infer", post(infer))
}

/// Whether a page makes samples, so that its answers count among those of `/sample`.
pub(super) fn makes_samples(path: &str) -> bool {
    path.starts_with("/v2/models/") && path.ends_with("/infer")
}

type Names = Path<Vec<(String, String)>>;

/// The model that a page is about. The error is the answer.
#[allow(clippy::result_large_err, reason = "one a request, and the error is its answer")]
fn known(s: &Service, Path(names): &Names) -> std::result::Result<Arc<Model>, Response> {
    let given = |what: &str| names.iter().find(|(k, _)| k == what).map(|(_, v)| v.as_str());
    let model = s.models.chosen(given("name"))?;
    match given("version") {
        Some(version) if version != VERSION => {
            let text = format!("no version {version} of `{}`: there is 1", model.name);
            Err(failure(StatusCode::NOT_FOUND, &text))
        }
        _ => Ok(model),
    }
}

fn page(value: &serde_json::Value) -> Response {
    answer(StatusCode::OK, "application/json", value.to_string().into_bytes().into())
}

async fn server() -> Response {
    page(&json!({ "name": "disback", "version": env!("CARGO_PKG_VERSION"), "extensions": ["binary_tensor_data"] }))
}

/// The models that are served (Triton's repository extension).
async fn index(State(s): State<Arc<Service>>) -> Response {
    let one = |m: &Arc<Model>| json!({ "name": m.name, "version": VERSION, "state": "READY" });
    page(&s.models.all().iter().map(one).collect::<Vec<_>>().into())
}

async fn ready(State(s): State<Arc<Service>>, names: Names) -> Response {
    match known(&s, &names) {
        Ok(_) => super::ready_for_more(State(s)).await.into_response(),
        Err(refused) => refused,
    }
}

async fn model(State(s): State<Arc<Service>>, names: Names) -> Response {
    let model = match known(&s, &names) {
        Ok(model) => model,
        Err(refused) => return refused,
    };
    let describe = |input: &ValueInfo| {
        let rows = input.shape.iter().skip(1).map(|d| if let Dim::Fixed(n) = d { *n as i64 } else { -1 });
        let shape: Vec<i64> = std::iter::once(-1).chain(rows).collect();
        json!({ "name": input.name, "datatype": wire::datatype(input.dtype), "shape": shape })
    };
    let inputs: Vec<_> = inputs(&model.info).map(|(input, _)| describe(input)).collect();
    let shape: Vec<i64> = std::iter::once(-1).chain(model.info.shape.iter().map(|&n| n as i64)).collect();
    page(&json!({ "name": model.name, "versions": [VERSION], "platform": "onnx_onnxv1", "inputs": inputs,
        "outputs": [{ "name": OUTPUT, "datatype": "FP32", "shape": shape }] }))
}

/// All inputs, with what a condition's rows hold.
fn inputs(info: &StudentInfo) -> impl Iterator<Item = (&ValueInfo, Option<&ConditionKind>)> {
    let conditions = info.conditions.iter().map(|c| (&c.input, Some(&c.kind)));
    std::iter::once((&info.noise, None)).chain(conditions)
}

async fn infer(State(s): State<Arc<Service>>, names: Names, headers: HeaderMap, body: Body) -> Response {
    let model = match known(&s, &names) {
        Ok(model) => model,
        Err(refused) => return refused,
    };
    let limit = s.options.timeout;
    match tokio::time::timeout(limit, inferred(s, model, headers, body)).await {
        Ok(Ok(response) | Err(response)) => response,
        Err(_) => late(limit),
    }
}

async fn inferred(s: Arc<Service>, model: Arc<Model>, headers: HeaderMap, body: Body) -> Answer {
    let bad = |text: &str| failure(StatusCode::BAD_REQUEST, text);
    if headers.get(header::CONTENT_ENCODING).is_some_and(|v| v != "identity") {
        return Err(failure(StatusCode::UNSUPPORTED_MEDIA_TYPE, "compressed requests are not taken"));
    }
    let length = match headers.get(HEAD_LENGTH).map(|v| v.to_str().ok().and_then(|t| t.trim().parse().ok())) {
        Some(None) => return Err(bad("Inference-Header-Content-Length is no number")),
        given => given.flatten(),
    };
    let (body, held) = received(&s, &headers, body).await?;
    let full = || busy("memory", "too much is in flight; try again");
    let held = held.resize(&s.budget, bytes_to_read(&body, s.options.body)).ok_or_else(full)?;
    let ended = |_| failure(StatusCode::SERVICE_UNAVAILABLE, "the server ends");
    let permit = s.readers.acquire().await.map_err(|_| busy("stopping", "the server ends"))?;
    let (of, most) = (model.clone(), s.options.batch);
    let read = move || -> Result<(Ask, Option<String>, bool)> {
        let wanted = Wanted::read(&body, length)?;
        Ok((asked(&of.info, most, &wanted)?, wanted.id, wanted.binary))
    };
    let read = tokio::task::spawn_blocking(read).await.map_err(ended)?;
    let (ask, id, binary) = read.map_err(|e| match e.kind() {
        Kind::Usage | Kind::Mismatch => bad(&e.to_string()),
        _ => failure(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
    })?;
    drop(permit);
    let values = ask.count * model.info.shape.iter().product::<usize>();
    let text = if binary { 0 } else { wire::CHARS * values as u64 };
    let held = held.resize(&s.budget, ask.bytes(&model.info) + text).ok_or_else(full)?;
    let samples = model.sample(ask.inputs, ask.count).await?;
    let write = move || wire::write(&model.name, VERSION, id.as_deref(), &samples, binary);
    let (head, bytes) = tokio::task::spawn_blocking(write).await.map_err(ended)?;
    let kind = if binary { "application/octet-stream" } else { "application/json" };
    let mut response = answer(StatusCode::OK, kind, held.keep(bytes));
    if binary {
        response.headers_mut().insert(HEAD_LENGTH, head.into());
    }
    Ok(response)
}

/// The request as the network wants it: what was given, checked, and the rest drawn from the seed.
///
/// Errors, of kinds Usage and Mismatch: tensors that no input takes, or that do not go together; a condition without rows.
fn asked(info: &StudentInfo, most: usize, wanted: &Wanted) -> Result<Ask> {
    if let Some(other) = wanted.outputs.iter().find(|o| *o != OUTPUT) {
        return Err(Error::mismatch(format!("no output `{other}`: there is `{OUTPUT}`")));
    }
    for (k, (name, _)) in wanted.tensors.iter().enumerate() {
        if wanted.tensors[..k].iter().any(|(n, _)| n == name) {
            return Err(Error::mismatch(format!("`{name}` is given twice")));
        }
        if !inputs(info).any(|(i, _)| i.name == *name) {
            let names: Vec<String> = inputs(info).map(|(i, _)| format!("`{}`", i.name)).collect();
            return Err(Error::mismatch(format!("no input `{name}`: there are {}", names.join(", "))));
        }
    }
    let given = |name: &str| wanted.tensors.iter().find(|(n, _)| n == name).map(|(_, t)| t);
    let count = match wanted.tensors.first() {
        Some((_, first)) => first.shape().first().copied().unwrap_or(0),
        None => wanted.n,
    };
    if count == 0 || count > most {
        return Err(Error::usage(format!("{count} samples in one request: expected 1 to {most}")));
    }
    if wanted.index.checked_add(count as u64).is_none() {
        return Err(Error::usage(format!(
            "index {} and {count} samples: there are 2^64 samples of a seed",
            wanted.index
        )));
    }
    let request = SampleRequest { seed: wanted.seed, batch: most, ..SampleRequest::default() };
    let mut drawn = Student::drawn_inputs(info, &request, wanted.index, count)?;
    let mut rows = Vec::new();
    for (input, kind) in inputs(info) {
        let tensor = match (given(&input.name), drawn.iter().position(|(n, _)| *n == input.name)) {
            (Some(t), _) => checked(input, kind, t, count)?,
            (None, Some(at)) => drawn.swap_remove(at).1,
            (None, None) => {
                let text =
                    format!("the student wants rows for its condition `{}`, {}", input.name, body::wanted(input));
                return Err(Error::mismatch(text));
            }
        };
        rows.push((input.name.clone(), Rows::Each(tensor)));
    }
    Ok(Ask { inputs: rows, count, npy: false })
}

/// A tensor that fits its input, in the input's element type.
fn checked(input: &ValueInfo, kind: Option<&ConditionKind>, t: &HostTensor, count: usize) -> Result<HostTensor> {
    let fits = t.rank() == input.shape.len()
        && t.shape().first() == Some(&count)
        && input.shape.iter().zip(t.shape()).skip(1).all(|(d, n)| match d {
            Dim::Fixed(m) => m == n,
            Dim::Symbol(_) => *n > 0,
        });
    if !fits {
        let text = format!(
            "`{}` is {}{:?}, expected {} with n = {count}",
            input.name,
            t.dtype(),
            t.shape(),
            body::wanted(input)
        );
        return Err(Error::mismatch(text));
    }
    if t.dtype().is_float() != input.dtype.is_float() {
        let expected = wire::datatype(input.dtype);
        return Err(Error::mismatch(format!("`{}` is {}, expected {expected}", input.name, wire::datatype(t.dtype()))));
    }
    if !t.is_finite() {
        return Err(Error::mismatch(format!("`{}` holds NaN or infinity", input.name)));
    }
    if let Some(ConditionKind::ClassIndex { classes }) = kind
        && let Some(wrong) = t.to_i64().into_iter().find(|&c| usize::try_from(c).map_or(true, |c| c >= *classes))
    {
        return Err(Error::usage(format!("`{}`: class {wrong}, the student has 0 to {}", input.name, classes - 1)));
    }
    Ok(t.cast(input.dtype))
}
