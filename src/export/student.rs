//! The one-step student as ONNX: `noise` and the teacher's conditions in, `sample` out; preconditioning inside, sigma folded
//! away.

use crate::diffusion::{Conversion, TeacherCard};
use crate::error::{Error, Result};
use crate::export::base;
use crate::export::build::{FORMS, Form, Plan, build};
use crate::export::trained::{Reference, compare};
use crate::graph::{edit, save};
use crate::onnx::{ModelProto, OperatorSetIdProto};
use crate::runtime::student::ROUNDING_SCALE;
use crate::torch::{Network, ParamSet};

/// What the metadata of a student says beside the card.
#[derive(Debug, Clone, Default)]
pub struct StudentOptions {
    /// Noise level at which the student starts; `None` is the schedule's own.
    pub sigma_init: Option<f64>,
    /// `disback`, or the base method's name where no trajectory was used.
    pub method: String,
    /// Name of the training objective, kept in the file's metadata; empty where the weights come from no run.
    pub objective: String,
    /// SHA-256 of the teacher's file.
    pub teacher_hash: String,
    /// Write it although it does not compute what was trained: a result that fails its check is still a result.
    pub unchecked: bool,
}

/// Builds the one-step student from the teacher's graph and the student's weights, and checks it in libtorch against the
/// training network at two batch sizes. Its weights are not copied where they can be shared: `params` must not change as long
/// as the model is in use.
///
/// Errors: a card that does not fit the graph; a student file that would not compute what was trained.
pub fn student(net: &Network, params: &ParamSet, card: &TeacherCard, options: &StudentOptions) -> Result<ModelProto> {
    let start = Conversion::new(card)?.at_start(options.sigma_init)?;
    let ours = net.with_weights(params)?;
    let reference = Reference { net: &ours, card, start: &start };
    // A time of shape [1] broadcasts over the batch in every usual network and leaves a constant embedding. Where a graph
    // insists on one time an image, the time is expanded to the batch inside the graph instead.
    // The same goes for inputs that the card fixes to a number.
    let base = base::base(net, params)?;
    needs_opset(&base)?;
    let variance = reference.learns_variance()?;
    let expected = match reference.samples() {
        Err(_) if options.unchecked => Vec::new(),
        other => other?,
    };
    let scale = expected.iter().fold(1.0, |m, e| e.scale.max(m));
    let finish = |built: ModelProto| {
        let mut built = describe(built, card, options, &[("sigma_init", start.sigma.to_string())])?;
        save::set_metadata(&mut built, ROUNDING_SCALE, &format!("{scale:.3e}"));
        Ok(built)
    };
    let mut failure = None;
    // The form that came nearest to the training network.
    let mut nearest: Option<(f64, ModelProto)> = None;
    for forms in FORMS {
        if forms.constants == Form::Expanded && card.constants.is_empty() && forms.time == Form::Folded {
            continue;
        }
        let built = build(&base, &Plan { net, card, start: &start, forms, variance })?;
        let apart = match compare(&built, &expected) {
            Ok(apart) if apart.within() => return finish(built),
            Ok(apart) => {
                failure = Some(apart.error());
                apart.relative()
            }
            Err(e) => {
                failure = Some(e);
                f64::INFINITY
            }
        };
        if options.unchecked && nearest.as_ref().is_none_or(|(best, _)| apart < *best) {
            nearest = Some((apart, built));
        }
    }
    if let Some((_, built)) = nearest {
        return finish(built);
    }
    Err(failure.expect("a form was tried").context("the exported student does not compute what was trained"))
}

/// The teacher's graph with the student's weights and nothing else changed.
pub fn same_graph(
    net: &Network,
    params: &ParamSet,
    card: &TeacherCard,
    options: &StudentOptions,
) -> Result<ModelProto> {
    let mut model = net.to_model(params)?;
    for (key, value) in card.to_metadata()? {
        save::set_metadata(&mut model, &key, &value);
    }
    save::set_metadata(&mut model, "disback.same_graph.method", &options.method);
    save::set_metadata(&mut model, "disback.same_graph.teacher_hash", &options.teacher_hash);
    Ok(model)
}

/// The operator set must know what a student needs.
pub(super) fn needs_opset(model: &ModelProto) -> Result<()> {
    match edit::opset(model) {
        8.. => Ok(()),
        old => Err(Error::unsupported(format!("a student at opset {old}, expected 8 or newer"))
            .hint("export the network with a newer opset")),
    }
}

/// Puts the card and what a student's file says about it into the metadata.
pub(super) fn describe(
    mut model: ModelProto,
    card: &TeacherCard,
    options: &StudentOptions,
    extra: &[(&str, String)],
) -> Result<ModelProto> {
    // IR version 4 is the first where initializers need not be inputs; ours are not.
    model.ir_version = Some(model.ir_version().max(4));
    if model.opset_import.is_empty() {
        model.opset_import.push(OperatorSetIdProto { domain: Some(String::new()), version: Some(8) });
    }
    model.producer_name = Some("disback".into());
    model.producer_version = Some(env!("CARGO_PKG_VERSION").into());
    // The framework's list speaks of the teacher's graph.
    model.metadata_props.retain(|p| !p.key().starts_with("disback.parameters"));
    for (key, value) in card.to_metadata()? {
        save::set_metadata(&mut model, &key, &value);
    }
    let entries = [
        ("method", options.method.clone()),
        ("objective", options.objective.clone()),
        ("steps", "1".to_owned()),
        ("teacher_hash", options.teacher_hash.clone()),
        ("noise", "standard normal".to_owned()),
        ("seed_convention", crate::noise::SEED_CONVENTION.to_owned()),
    ];
    for (key, value) in entries.iter().chain(extra) {
        save::set_metadata(&mut model, &format!("disback.student.{key}"), value);
    }
    Ok(model)
}
