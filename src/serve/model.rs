//! The students that are served, each with the thread that runs its network.

use std::sync::Arc;
use std::thread::JoinHandle;

use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};

use super::batcher::{Batcher, Limits, Refused, Rows};
use super::metrics::Metrics;
use super::{body, busy, failure};
use crate::error::{Context, Error, Result};
use crate::runtime::student::{SampleRequest, Student, StudentInfo};
use crate::tensor::HostTensor;

/// One student.
pub(super) struct Model {
    /// The name by which it is asked for.
    pub name: String,
    pub info: StudentInfo,
    /// What runs it.
    pub engine: String,
    batcher: Batcher,
}

impl Model {
    /// What it is, for people and programs.
    pub fn described(&self) -> Value {
        let info = &self.info;
        let conditions: serde_json::Map<String, Value> =
            info.embeddings().map(|c| (c.input.name.clone(), json!(body::wanted(&c.input)))).collect();
        json!({ "name": self.name, "engine": self.engine, "shape": info.shape, "noise_shape": info.noise_shape,
            "classes": info.classes(), "conditions": conditions, "range": info.range })
    }

    /// The samples for these inputs. The error is the answer.
    #[allow(clippy::result_large_err, reason = "one a request, and the error is its answer")]
    pub async fn sample(&self, inputs: Vec<(String, Rows)>, count: usize) -> std::result::Result<HostTensor, Response> {
        self.batcher.sample(inputs, count).await.map_err(|refused| match refused {
            Refused::Busy => busy("queue", "too many requests wait; try again"),
            Refused::Failed(e) => failure(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
        })
    }
}

/// All of them, in the order of the command line.
pub(super) struct Models(Vec<Arc<Model>>);

impl Models {
    /// Runs each student once, then starts its thread.
    ///
    /// Errors: a student that does not run; a name that is empty or given twice.
    pub fn start(
        students: Vec<(String, Student)>,
        limits: Limits,
        metrics: &Metrics,
    ) -> Result<(Self, Vec<JoinHandle<()>>)> {
        let (mut models, mut threads): (Vec<Arc<Model>>, _) = (Vec::new(), Vec::new());
        for (name, mut student) in students {
            if name.is_empty() || name.contains('/') {
                return Err(Error::usage(format!("`{name}` is no name of a model: expected one without /")));
            }
            if models.iter().any(|m| m.name == name) {
                return Err(Error::usage(format!("two models have the name `{name}`"))
                    .hint("NAME=FILE gives a student another name than that of its file"));
            }
            // A student that cannot run should not become healthy; the first caller should not wait for what is made once.
            let info = student.info().clone();
            let warm_up = SampleRequest { batch: 1, embeddings: info.random_rows(0, 1)?, ..SampleRequest::default() };
            let tried = student.sample(&warm_up, 0, 1).and_then(|_| student.foresee(&warm_up, limits.batch));
            tried.with_context(|| format!("model `{name}`"))?;
            let engine = student.engine_name();
            let (batcher, thread) = Batcher::start(student, limits, metrics.of_model(&name, &engine))?;
            models.push(Arc::new(Model { name, info, engine, batcher }));
            threads.push(thread);
        }
        Ok((Self(models), threads))
    }

    pub fn all(&self) -> &[Arc<Model>] {
        &self.0
    }

    /// The model of this name; without one the only model. The error is the answer.
    #[allow(clippy::result_large_err, reason = "one a request, and the error is its answer")]
    pub fn chosen(&self, name: Option<&str>) -> std::result::Result<Arc<Model>, Response> {
        let names = || self.0.iter().map(|m| format!("`{}`", m.name)).collect::<Vec<_>>().join(", ");
        match (name, &self.0[..]) {
            (None, [only]) => Ok(only.clone()),
            (None, _) => {
                let text = format!("several models are served: model=NAME says which, there are {}", names());
                Err(failure(StatusCode::BAD_REQUEST, &text))
            }
            (Some(name), all) => all.iter().find(|m| m.name == name).cloned().ok_or_else(|| {
                let there =
                    if all.len() == 1 { format!("there is {}", names()) } else { format!("there are {}", names()) };
                failure(StatusCode::NOT_FOUND, &format!("no model `{name}`: {there}"))
            }),
        }
    }
}
