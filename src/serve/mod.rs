//! A student behind HTTP: `/sample`, `/health`, `/metrics`. What a team puts behind its balancer.

mod batcher;
mod body;
mod metrics;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;

use crate::error::{Error, Kind, Result};
use crate::io::images::{encode_png, quantise};
use crate::io::npy;
use crate::report::grid;
use crate::runtime::student::{Request, Student, StudentInfo};
use crate::tensor::HostTensor;

use batcher::{Batcher, Limits, Refused};
use body::Given;
use metrics::Metrics;

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Address and port to listen on; port 0 lets the system choose a free one.
    pub address: SocketAddr,
    /// Images a call of the network, and a request, at most.
    pub batch: usize,
    /// How long a request waits at most for others to share its call.
    pub wait: Duration,
    /// Requests that may wait; further ones get 503.
    pub queue: usize,
    /// Largest body, bytes.
    pub body: usize,
    /// How long requests are still taken after the signal to stop; `/health` reports the stop meanwhile.
    pub drain: Duration,
}

struct Service {
    info: StudentInfo,
    engine: String,
    options: ServeOptions,
    batcher: Batcher,
    metrics: Arc<Metrics>,
    stopping: AtomicBool,
}

/// Serves until the process is told to stop (SIGINT, SIGTERM): then, at once or after [`ServeOptions::drain`], no connection is
/// taken any more, and what was asked for is answered. A second word to stop ends the waiting. `ready` hears the address in use.
///
/// Errors: an address that is taken; a student that does not run.
pub fn serve(mut student: Student, options: ServeOptions, ready: impl FnOnce(SocketAddr)) -> Result<()> {
    // A student that cannot run should not become healthy; the first caller should not wait for what is made once.
    let info = student.info().clone();
    let warm_up = Request { batch: 1, embeddings: info.random_rows(0, 1)?, ..Request::default() };
    student.sample(&warm_up, 0, 1)?;
    let engine = student.engine_name();
    let metrics = Arc::new(Metrics::new(engine.clone()));
    let limits = Limits { batch: options.batch, wait: options.wait, queue: options.queue };
    let (batcher, thread) = Batcher::start(student, limits, metrics.clone())?;
    let address = options.address;
    let drain = options.drain;
    let service = Arc::new(Service { info, engine, batcher, metrics, options, stopping: AtomicBool::new(false) });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async move {
        let listener = TcpListener::bind(address).await.map_err(|e| {
            Error::io(format!("cannot listen on {address}: {e}")).hint("choose another with --host and --port")
        })?;
        ready(listener.local_addr()?);
        let app = Router::new()
            .route("/sample", get(sample).post(sample))
            .route("/health", get(health))
            .route("/metrics", get(page))
            .fallback(unknown)
            .layer(DefaultBodyLimit::max(service.options.body))
            .with_state(service.clone());
        let stop = async move {
            stopped().await;
            service.stopping.store(true, Ordering::Relaxed);
            // The service, and with it the network's thread, ends with the last connection.
            drop(service);
            if !drain.is_zero() {
                tokio::select! {
                    () = tokio::time::sleep(drain) => {}
                    () = stopped() => {}
                }
            }
        };
        axum::serve(listener, app).with_graceful_shutdown(stop).await?;
        Ok::<_, Error>(())
    })?;
    drop(runtime);
    // All senders are gone: the network's thread finishes what waits and ends.
    thread.join().map_err(|_| Error::backend("the network's thread panicked"))
}

async fn stopped() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
            tokio::select! {
                _ = int.recv() => {}
                _ = term.recv() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

async fn health(State(s): State<Arc<Service>>) -> Response {
    let conditions: serde_json::Map<String, serde_json::Value> =
        s.info.embeddings().map(|c| (c.input.name.clone(), json!(body::wanted(&c.input)))).collect();
    let stopping = s.stopping.load(Ordering::Relaxed);
    let (code, status) = if stopping { (StatusCode::SERVICE_UNAVAILABLE, "stopping") } else { (StatusCode::OK, "ok") };
    let body = json!({ "status": status, "version": env!("CARGO_PKG_VERSION"), "engine": s.engine, "shape": s.info.shape,
        "noise_shape": s.info.noise_shape, "classes": s.info.classes(), "conditions": conditions, "range": s.info.range,
        "max_images": s.options.batch, "max_body_bytes": s.options.body });
    answer(code, "application/json", body.to_string().into_bytes())
}

async fn page(State(s): State<Arc<Service>>) -> Response {
    match s.metrics.text() {
        Ok(text) => answer(StatusCode::OK, metrics::CONTENT_TYPE, text.into_bytes()),
        Err(_) => failure(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written"),
    }
}

async fn unknown() -> Response {
    failure(StatusCode::NOT_FOUND, "no such page: there are /sample, /health and /metrics")
}

/// What may be asked of `/sample`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
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
    /// `png` or `npy`; by the Accept header where absent.
    format: Option<String>,
}

/// `GET` draws the noise from the seed; `POST` may bring it, and brings rows for conditions that are no classes: see
/// [`body::Given`].
async fn sample(
    State(s): State<Arc<Service>>,
    headers: HeaderMap,
    query: std::result::Result<Query<Wanted>, QueryRejection>,
    body: std::result::Result<Bytes, BytesRejection>,
) -> Response {
    let began = Instant::now();
    let response = match wanted(&s, &headers, query, body) {
        Err(response) => response,
        Ok((inputs, count, npy)) => match s.batcher.sample(inputs, count).await {
            Ok(samples) => {
                let written = write(&samples, &s.info, npy);
                written.unwrap_or_else(|e| failure(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()))
            }
            Err(Refused::Busy) => {
                let mut busy = failure(StatusCode::SERVICE_UNAVAILABLE, "too many requests wait; try again");
                busy.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
                busy
            }
            Err(Refused::Failed(e)) => failure(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
        },
    };
    s.metrics.answered(response.status().as_u16(), began.elapsed().as_secs_f64());
    response
}

type Prepared = (Vec<(String, HostTensor)>, usize, bool);

#[allow(clippy::result_large_err, reason = "one a request, and the error is its answer")]
fn wanted(
    s: &Service,
    headers: &HeaderMap,
    query: std::result::Result<Query<Wanted>, QueryRejection>,
    body: std::result::Result<Bytes, BytesRejection>,
) -> std::result::Result<Prepared, Response> {
    let bad = |text: &str| failure(StatusCode::BAD_REQUEST, text);
    let plain = |e: QueryRejection| e.body_text().replacen("Failed to deserialize query string", "the query", 1);
    let Query(w) = query.map_err(|e| bad(&plain(e)))?;
    let body = body.map_err(|e| {
        if e.status() == StatusCode::PAYLOAD_TOO_LARGE {
            failure(e.status(), &format!("the body has more than {} bytes", s.options.body))
        } else {
            bad(&e.body_text())
        }
    })?;
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("");
    let npy = match w.format.as_deref() {
        Some("npy") => true,
        Some("png") => false,
        Some(other) => return Err(bad(&format!("format={other}: expected png or npy"))),
        None => accept.contains("npy") || accept.contains("octet-stream"),
    };
    if !npy && s.info.image_shape().is_none() {
        return Err(bad("the student's samples are no images: ask for format=npy"));
    }
    if !npy && s.info.range.is_none() {
        return Err(bad("the student makes latents, which are no images: ask for format=npy"));
    }
    let classes = w.classes.split(',').filter(|c| !c.trim().is_empty()).map(|c| c.trim().parse::<usize>());
    let classes = classes
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|_| bad(&format!("classes={}: expected numbers by commas", w.classes)))?;
    let given = Given::read(&body, &s.info, s.options.body).map_err(|e| bad(&e.to_string()))?;
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
    if count > s.options.batch {
        let text = format!("{count} images in one request, at most {} are made", s.options.batch);
        return Err(failure(StatusCode::PAYLOAD_TOO_LARGE, &text));
    }
    if let Some(missing) = s.info.embeddings().find(|c| !given.rows.iter().any(|(n, _)| *n == c.input.name)) {
        return Err(bad(&format!(
            "the student wants rows for its condition `{}`, {}: POST an .npz archive or a JSON object with an array of that name",
            missing.input.name,
            body::wanted(&missing.input)
        )));
    }
    let request = Request { seed: w.seed, classes, embeddings: given.rows.clone(), batch: s.options.batch };
    let made = Student::inputs_of(&s.info, &request, w.index, count);
    let mut inputs = made.map_err(|e| match e.kind() {
        Kind::Usage | Kind::Mismatch => bad(&e.to_string()),
        _ => failure(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
    })?;
    for (name, input) in &mut inputs {
        if name == "noise" {
            if let Some(noise) = &given.noise {
                input.clone_from(noise);
            }
        } else if let Some((_, rows)) =
            given.rows.iter().find(|(n, _)| n == name).filter(|(_, t)| t.shape()[0] == count)
        {
            // Rows are for the images of this request, whichever numbers of the seed these have.
            input.clone_from(rows);
        }
    }
    Ok((inputs, count, npy))
}

fn write(samples: &HostTensor, info: &StudentInfo, as_npy: bool) -> Result<Response> {
    if as_npy {
        let mut out = Vec::new();
        npy::write_to(&mut out, samples)?;
        return Ok(answer(StatusCode::OK, "application/x-npy", out));
    }
    let png = match (samples.shape().first(), info.range, info.image_shape()) {
        (Some(1), Some(range), Some(shape)) if matches!(shape[0], 1 | 3) => {
            let bytes: Vec<u8> = samples.to_f64().iter().map(|&x| quantise(x, range)).collect();
            encode_png(&bytes, shape)?
        }
        _ => grid::png(samples, info.range, None)?,
    };
    Ok(answer(StatusCode::OK, "image/png", png))
}

fn answer(status: StatusCode, kind: &'static str, body: Vec<u8>) -> Response {
    (status, [(header::CONTENT_TYPE, kind)], body).into_response()
}

fn failure(status: StatusCode, text: &str) -> Response {
    answer(status, "application/json", json!({ "error": text }).to_string().into_bytes())
}
