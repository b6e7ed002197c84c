//! The proposed card: what is given, what the file gives away, what the probe measures, and what stays open.

use serde::Serialize;

use crate::diffusion::{InputSpec, TeacherCard};
use crate::error::Result;
use crate::graph::{Graph, Model};
use crate::inspect::findings::{Finding, Findings, Known};
use crate::inspect::probe::{self, Options, Report};
use crate::inspect::structure;
use crate::inspect::subject::{Run, Subject};

/// Side of the images on which a network with free spatial sizes is probed.
const PROBE_SIDE: usize = 32;

/// A proposed card with what speaks for each of its values.
#[derive(Debug, Clone)]
pub struct Proposal {
    /// The values of the card and what speaks for each of them.
    pub findings: Findings,
    /// What the numerical probe did; absent where it was not run.
    pub probe: Option<Report>,
    /// Why the probe could not be run.
    pub failed: Option<String>,
}

/// The proposal as JSON shows it beside the card's values.
#[derive(Debug, Serialize)]
pub struct Shown<'a> {
    /// Dotted keys that have no value yet.
    pub undecided: Vec<String>,
    /// All findings, in the order in which they were made.
    pub findings: Vec<&'a Finding>,
    /// What the numerical probe did; absent where it was not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe: Option<&'a Report>,
    /// Why the probe could not be run; absent where it ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe_failed: Option<&'a str>,
}

/// Proposes a card for a model. `run`: the network for the probe, with its options; without it only names, shapes and the
/// graph speak.
pub fn propose(model: &Model, graph: &Graph, known: &Known, run: Option<(&mut dyn Run, Options)>) -> Proposal {
    let mut findings = structure::read(graph, known, &model.path);
    let (mut probe, mut failed) = (None, None);
    let Some((run, options)) = run else {
        for (path, what) in [
            (&["prediction"] as &[&str], "prediction"),
            (&["time_unit"], "time unit"),
            (&["schedule", "kind"], "schedule"),
        ] {
            if !findings.given(path) {
                findings.undecided(path, format!("the probe, which measures the {what}, was not run"));
            }
        }
        return Proposal { findings, probe, failed };
    };
    match numbers(graph, &mut findings, run, options) {
        Ok(report) => probe = Some(report),
        Err(e) => {
            let why = e.to_string();
            for path in [&["prediction"] as &[&str], &["time_unit"], &["schedule", "kind"]] {
                if !findings.given(path) {
                    findings.undecided(path, format!("the probe failed: {}", why.lines().next().unwrap_or_default()));
                }
            }
            failed = Some(why);
        }
    }
    Proposal { findings, probe, failed }
}

fn numbers(graph: &Graph, findings: &mut Findings, run: &mut dyn Run, options: Options) -> Result<Report> {
    let inputs: Vec<InputSpec> = graph.inputs.iter().map(InputSpec::from).collect();
    let (base, steps) = base(graph, findings)?;
    let mut subject = Subject::new(run, &base, &inputs)?;
    probe::probe(&mut subject, &base, steps, findings, options)
}

/// A card to run the network with, and the entries of its table of times.
pub(super) fn base(graph: &Graph, findings: &Findings) -> Result<(TeacherCard, Option<usize>)> {
    let time = findings.text(&["time"]).and_then(|n| graph.inputs.iter().find(|p| p.name == n));
    let integer = time.is_some_and(|p| p.dtype.is_some_and(|d| !d.is_float()));
    let steps = time.filter(|_| integer).and_then(|p| structure::rows_looked_up(graph, p.value)).map(|(n, _)| n);
    let mut with_shape = findings.clone();
    if let Some(shape) = guessed_shape(graph, findings) {
        with_shape.value(&["shape"], shape, crate::inspect::How::Assumed, "");
    }
    let card = with_shape
        .stand_in(integer)
        .ok_or_else(|| crate::Error::usage(format!("the probe needs to know first: {}", findings.open().join(", "))))?;
    Ok((card, steps))
}

/// The shape where only its spatial sizes are free, or its length.
fn guessed_shape(graph: &Graph, findings: &Findings) -> Option<Vec<i64>> {
    let open = findings.get(&["shape"])?.value.is_none();
    let sample = findings.text(&["sample"])?;
    let dims = graph.inputs.iter().find(|p| p.name == sample)?.dims()?;
    let mut row = dims.get(1..)?.to_vec();
    let layout = findings.text(&["layout"]);
    let channels = match layout.as_deref() {
        Some("nhwc" | "channels-last") => row.len().checked_sub(1),
        Some("frames-first") => Some(1),
        _ if row.len() > 1 => Some(0),
        _ => None,
    };
    if !open || row.is_empty() || channels.is_some_and(|at| row.get(at).is_none_or(Option::is_none)) {
        return None;
    }
    if layout.as_deref() == Some("nhwc") {
        row.rotate_right(1);
    }
    Some(row.into_iter().map(|d| d.unwrap_or(PROBE_SIDE) as i64).collect())
}

impl Proposal {
    /// The card, where it is complete.
    pub fn card(&self) -> Result<TeacherCard> {
        self.findings.card()
    }

    /// A card that is good for running the network, complete or not.
    pub fn stand_in(&self, graph: &Graph) -> Option<TeacherCard> {
        base(graph, &self.findings).ok().map(|(card, _)| card)
    }

    /// What JSON shows beside the values.
    pub fn shown(&self) -> Shown<'_> {
        Shown {
            undecided: self.findings.open(),
            findings: self.findings.iter().collect(),
            probe: self.probe.as_ref(),
            probe_failed: self.failed.as_deref(),
        }
    }
}
