//! The numerical probe: which reading of a network makes it a denoiser of its own samples, and by what margin.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::diffusion::{Condition, Prediction, ScheduleSpec, TeacherCard, TimeUnit};
use crate::error::Result;
use crate::inspect::findings::{Findings, How};
use crate::inspect::hypothesis::{self, Family, Hypothesis, Settled, word};
use crate::inspect::score::{Effort, FEW_LEVELS, LEVELS, Score, denoise, score};
use crate::inspect::subject::{Feed, Subject};
use crate::noise::batch_noise;

/// Scores above this fit nothing.
const FITS: f64 = 0.4;
/// A rival is beaten when its score is above `BEATEN * best + CLEAR`.
const BEATEN: f64 = 1.5;
const CLEAR: f64 = 0.03;
/// A null class denoises to the mean of the classes: nearer to it than this share of what a class is.
const NULL_SHARE: f64 = 0.4;

/// One combination of prediction, time unit and schedule with its score.
#[derive(Debug, Clone, Serialize)]
pub struct ProbeRow {
    /// What the network's output was taken to be.
    pub prediction: Prediction,
    /// What number the time input was taken to be.
    pub time_unit: TimeUnit,
    /// Kind of the schedule, as the card writes it (`edm`, `vp`, `flow`); `given`: the one that the card states.
    pub schedule: &'static str,
    /// How the betas of a VP schedule are made, as the card writes it; absent for the other schedules.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub betas: Option<&'static str>,
    /// Which way a flow's time runs, as the card writes it; absent for the other schedules.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direction: Option<&'static str>,
    /// Standard deviation of the data; absent except for the prediction `edm-raw`, the only one that depends on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigma_data: Option<f64>,
    /// How far the network is from a denoiser of its own samples when read like this, in nats; 0 is a perfect denoiser.
    pub score: f64,
}

/// What the probe did and found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Combinations tried. A combination whose samples diverged or all became equal has no score.
    pub tried: usize,
    /// Combinations not tried because the time was over.
    pub unexamined: usize,
    /// Samples that the network was run on.
    pub evaluations: usize,
    /// Seconds spent in the network.
    pub seconds: f64,
    /// The best combinations (six at most), best first.
    pub readings: Vec<ProbeRow>,
    /// Values that the probe decided, by dotted key of the card.
    pub measured: BTreeMap<String, toml::Value>,
    /// Keys that the card's sources give and the numbers contradict.
    pub contradicted: Vec<String>,
}

/// What to probe for.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// No further combination is tried after this many seconds in the network.
    pub seconds: f64,
    /// Multiply-adds of one image, where they are known: what the network costs decides how thoroughly it is probed, the
    /// same on a busy machine as on an idle one.
    pub macs: Option<u64>,
    /// Do not take prediction, time unit and schedule from the card's sources: check them.
    pub verify: bool,
}

/// Probes the network and adds what was found to `findings`.
///
/// `base`: names, shape, layout, conditions and constants (see [`Findings::stand_in`]); `steps`: entries of the table that
/// an integer time picks from, where the graph shows them.
///
/// Errors: a network that does not run on inputs of its own signature.
pub fn probe(
    net: &mut Subject,
    base: &TeacherCard,
    steps: Option<usize>,
    findings: &mut Findings,
    options: Options,
) -> Result<Report> {
    let settled = settled(base, steps, findings, options.verify);
    let mut readings = hypothesis::all(base, &settled);
    let name = base.time.to_lowercase();
    readings.sort_by_key(|h| unlikely(h, &name));
    let classes = base.conditions.values().filter_map(Condition::classes).min().unwrap_or(1).max(1);
    // One row, to learn whether it runs at all.
    let len = net.elements();
    let trial: Vec<f32> = batch_noise(1, 0, 1, len);
    let time = readings.first().map_or(1.0, |h| h.conversion.time(1.0));
    net.forward(&trial, time, &[Feed::Class(0)])
        .map_err(|e| e.context("the network does not run on inputs of its own signature"))?;
    let linear = is_affine(net, &readings, len)?;
    let effort = effort(len, readings.len(), options.macs);
    let feeds: Vec<Feed> = (0..effort.rows).map(|i| Feed::Class(i % classes)).collect();

    let mut scored: Vec<(Hypothesis, Score)> = Vec::new();
    let (mut tried, mut left) = (0, Vec::new());
    for h in readings {
        if net.seconds > options.seconds {
            left.push(h);
            continue;
        }
        tried += 1;
        // What is beaten by far need not be known more closely.
        let best = scored.iter().map(|(_, s): &(Hypothesis, Score)| s.total).fold(FITS, f64::min);
        let bound = (2.0 * (BEATEN * best + CLEAR)).max(FITS);
        if let Some(s) = score(net, &h, effort, &feeds, bound) {
            scored.push((h, s));
        }
    }
    scored.sort_by(|a, b| a.1.total.total_cmp(&b.1.total));
    let mut report = Report {
        tried,
        unexamined: left.len(),
        evaluations: 0,
        seconds: 0.0,
        readings: scored.iter().take(6).map(|(h, s)| row(h, s)).collect(),
        measured: BTreeMap::new(),
        contradicted: Vec::new(),
    };
    conclude(&scored, &left, &settled, findings, &mut report);
    if linear {
        leave_open(findings, &mut report);
    }
    let told = report.measured.contains_key("prediction") || settled.prediction.is_some();
    if let Some((h, s)) = scored.first().filter(|(_, s)| told && s.total <= FITS) {
        range_and_deviation(base, h, s, findings);
        null_classes(net, base, h, s, classes, findings)?;
    }
    for (key, value) in &report.measured {
        let path: Vec<&str> = key.split('.').collect();
        if findings.given(&path) && findings.get(&path).and_then(|f| f.value.as_ref()) != Some(value) {
            report.contradicted.push(key.clone());
        }
    }
    report.evaluations = net.evaluated;
    report.seconds = net.seconds;
    Ok(report)
}

/// Bend of a network, relative to its slope, below which it counts as affine.
const BENT: f32 = 1e-3;

/// Whether the network is affine in its sample at every time that is looked at, as the denoiser of one Gaussian is.
fn is_affine(net: &mut Subject, readings: &[Hypothesis], len: usize) -> Result<bool> {
    const PAIRS: usize = 2;
    let noise = batch_noise(7, 0, 2 * PAIRS, len);
    let (at, step) = noise.split_at(PAIRS * len);
    let moved = |by: f32| at.iter().zip(step).map(|(x, d)| x + by * d).collect::<Vec<f32>>();
    let feeds = [Feed::Class(0); PAIRS];
    for h in readings.iter().take(3) {
        for sigma in [0.2, 1.0, 5.0] {
            let time = h.conversion.time(sigma);
            let mut value = |by: f32| net.forward(&moved(by), time, &feeds);
            let (low, middle, high) = (value(-1.0)?, value(0.0)?, value(1.0)?);
            let square = |f: &dyn Fn(usize) -> f32| (0..middle.len()).map(|i| f(i) * f(i)).sum::<f32>().sqrt();
            let bend = square(&|i| high[i] - 2.0 * middle[i] + low[i]);
            // (What is not finite is no straight line.)
            if !(bend <= BENT * square(&|i| high[i] - low[i])) {
                return Ok(false);
            }
        }
    }
    Ok(!readings.is_empty())
}

/// What the scores decided of an affine network is taken back: several readings explain such a network, with data of another size.
fn leave_open(findings: &mut Findings, report: &mut Report) {
    for key in std::mem::take(&mut report.measured).into_keys() {
        let path: Vec<&str> = key.split('.').collect();
        if !findings.given(&path) {
            findings.undecided(
                &path,
                "the network is affine in its sample, as a denoiser of Gaussian data is: several readings explain it; give it",
            );
        }
    }
}

fn row(h: &Hypothesis, s: &Score) -> ProbeRow {
    let (schedule, betas) = h.family.keys();
    ProbeRow {
        prediction: h.prediction,
        time_unit: h.time_unit,
        schedule,
        betas,
        direction: h.family.direction(),
        sigma_data: (h.prediction == Prediction::EdmRaw).then_some(h.sigma_data),
        score: (s.total * 1e4).round() / 1e4,
    }
}

fn settled(base: &TeacherCard, steps: Option<usize>, findings: &Findings, verify: bool) -> Settled {
    let table = findings.table();
    let given = |path: &[&str]| !verify && findings.given(path);
    let read = |key: &str| table.get(key).cloned();
    Settled {
        prediction: given(&["prediction"]).then(|| read("prediction")?.try_into().ok()).flatten(),
        time_unit: given(&["time_unit"]).then(|| read("time_unit")?.try_into().ok()).flatten(),
        schedule: given(&["schedule", "kind"]).then(|| read("schedule")?.try_into::<ScheduleSpec>().ok()).flatten(),
        sigma_data: findings.given(&["sigma_data"]).then_some(base.sigma_data),
        named_sigma: base.time.to_lowercase().contains("sigma"),
        integer_time: base.time_unit == TimeUnit::Step,
        steps,
    }
}

/// Order of trial where time is short: names first, then what is common.
fn unlikely(h: &Hypothesis, time: &str) -> u8 {
    let sigma = time.contains("sigma") || time.contains("noise");
    let step = time.contains("step");
    let unit = match h.time_unit {
        TimeUnit::Sigma | TimeUnit::LnSigma4 => u8::from(!sigma),
        TimeUnit::LnSigma250 | TimeUnit::LnSigmaHalf | TimeUnit::Radians => 1,
        TimeUnit::Step | TimeUnit::Thousand => u8::from(!step),
        TimeUnit::Unit => u8::from(sigma || step),
    };
    let pair = match (h.prediction, h.family) {
        (Prediction::Denoised | Prediction::EdmRaw, Family::Edm) => 0,
        (Prediction::Epsilon | Prediction::V, Family::VpLinear | Family::VpScaledLinear | Family::VpCosine) => 0,
        (Prediction::Flow, _) | (_, Family::Given) => 0,
        _ => 1,
    };
    2 * pair + unit
}

/// Many rows for small samples; a short course for networks of many multiply-adds, and for those of unknown cost.
fn effort(len: usize, readings: usize, macs: Option<u64>) -> Effort {
    /// About a minute or two of two CPU cores.
    const MOST_MACS: f64 = 5e12;
    let full = Effort { rows: (3072 / len.max(1)).clamp(12, 48), steps: 16, levels: &LEVELS };
    let few = Effort { rows: 4, steps: 10, levels: &FEW_LEVELS };
    // About half of the readings give up early.
    let needed = 0.5 * (readings * full.cost()) as f64 * macs.map_or(f64::INFINITY, |m| m as f64);
    if needed <= MOST_MACS { full } else { few }
}

/// Decides each key whose every other value is beaten.
fn conclude(
    scored: &[(Hypothesis, Score)],
    left: &[Hypothesis],
    settled: &Settled,
    findings: &mut Findings,
    report: &mut Report,
) {
    type Key = fn(&Hypothesis) -> Option<String>;
    let keys: [(&[&str], Key); 5] = [
        (&["prediction"], |h| Some(word(&h.prediction))),
        (&["time_unit"], |h| Some(word(&h.time_unit))),
        (&["schedule", "kind"], |h| Some(h.family.keys().0.to_owned())),
        (&["schedule", "betas"], |h| h.family.keys().1.map(str::to_owned)),
        (&["schedule", "direction"], |h| h.family.direction().map(str::to_owned)),
    ];
    let Some((best, lead)) = scored.first() else {
        let why =
            format!("no reading of {} makes the network a denoiser: all blow up or fall to a point", report.tried);
        keys[..3].iter().for_each(|(path, _)| findings.undecided(path, why.clone()));
        return;
    };
    let decided = |path: &[&str], value: String, evidence: String, findings: &mut Findings, report: &mut Report| {
        report.measured.insert(path.join("."), value.clone().into());
        findings.value(path, value, How::Measured, evidence);
    };
    let limit = BEATEN * lead.total + CLEAR;
    for (path, key) in keys {
        let Some(value) = key(best) else { continue };
        if best.family == Family::Given && path[0] == "schedule" {
            continue;
        }
        if path == ["time_unit"] && settled.integer_time {
            findings.value(path, value, How::Read, "the time input holds integers");
            continue;
        }
        let rival = scored.iter().find(|(h, _)| key(h).is_some_and(|k| k != value));
        let shown = |h: &Hypothesis, s: f64| format!("{h}: {s:.3}");
        if lead.total > FITS {
            findings.undecided(path, format!("nothing fits; the best reading is {}", shown(best, lead.total)));
            continue;
        }
        let open = left.iter().filter(|h| key(h).is_some_and(|k| k != value)).count();
        if open > 0 {
            findings.undecided(
                path,
                format!(
                    "`{value}` fits ({:.3}), but {open} other readings were not tried: --probe-seconds",
                    lead.total
                ),
            );
            continue;
        }
        // A name speaks where the numbers leave a choice and it is for the best of them.
        let near = || scored.iter().filter(|(h, s)| key(h).is_some_and(|k| k != value) && s.total < limit);
        let told = settled.named_sigma && best.time_unit == TimeUnit::Sigma;
        if told && near().next().is_some() && near().all(|(h, _)| h.time_unit != TimeUnit::Sigma) {
            let why = format!("the time input's name, and the best score: {:.3}", lead.total);
            report.measured.insert(path.join("."), value.clone().into());
            findings.value(path, value, How::Read, why);
            continue;
        }
        match rival {
            Some((h, s)) if s.total < limit => {
                findings.undecided(path, format!("too near: {}; {}", shown(best, lead.total), shown(h, s.total)))
            }
            Some((h, s)) => {
                let evidence = format!("score {:.3}; the next is {}", lead.total, shown(h, s.total));
                decided(path, value, evidence, findings, report);
            }
            None => {
                let evidence = format!("score {:.3}; every other reading blows up or falls to a point", lead.total);
                decided(path, value, evidence, findings, report);
            }
        }
    }
    if !report.measured.contains_key("schedule.kind") {
        return;
    }
    let usual = "usual; the network does not show it";
    match best.family {
        Family::Edm => {
            findings.value(&["schedule", "sigma_min"], 0.002, How::Assumed, usual);
            findings.value(&["schedule", "sigma_max"], 80.0, How::Assumed, usual);
        }
        Family::Flow | Family::FlowReversed => findings.value(&["schedule", "shift"], 1.0, How::Assumed, usual),
        Family::VpLinear | Family::VpScaledLinear | Family::VpCosine => {
            let (n, how, why) = match settled.steps {
                Some(n) => (n, How::Read, "rows of the table of times"),
                None => (1000, How::Assumed, usual),
            };
            findings.value(&["schedule", "steps"], n as i64, how, why);
        }
        Family::Given => {}
    }
}

/// Value range and standard deviation of the winner's samples.
fn range_and_deviation(base: &TeacherCard, h: &Hypothesis, s: &Score, findings: &mut Findings) {
    let n = s.samples.len() as f64;
    let mean = s.samples.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let deviation = (s.samples.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n).sqrt();
    if h.prediction == Prediction::EdmRaw {
        findings.value(&["sigma_data"], h.sigma_data, How::Measured, "the value under which it denoises");
    } else {
        // EDM's 0.5 is what networks for data of about that scale were trained with, whatever the data's own deviation.
        let seen = format!("its samples have the standard deviation {deviation:.2}");
        if (0.25..0.9).contains(&deviation) {
            findings.value(&["sigma_data"], 0.5, How::Assumed, format!("usual; {seen}"));
        } else {
            findings.value(&["sigma_data"], (deviation * 100.0).round() / 100.0, How::Measured, seen);
        }
    }
    let mut sorted: Vec<f32> = s.samples.clone();
    sorted.sort_by(f32::total_cmp);
    let at = |q: f64| sorted[((sorted.len() - 1) as f64 * q).round() as usize];
    let (low, high) = (at(0.002), at(0.998));
    let seen = format!("its samples run from {low:.2} to {high:.2}");
    let images = base.image_shape().is_some_and(|[c, ..]| c == 1 || c == 3);
    let range = match (low, high) {
        (l, h) if (-1.35..=-0.6).contains(&l) && (0.5..=1.35).contains(&h) => Some([-1.0, 1.0]),
        (l, h) if (-0.2..=0.25).contains(&l) && (0.6..=1.25).contains(&h) => Some([0.0, 1.0]),
        _ => None,
    };
    match range.filter(|_| images) {
        Some(r) => findings.value(&["range"], r.to_vec(), How::Measured, seen),
        // No range is a value too (latents), so an open range holds nobody up.
        None => tracing::info!("no range proposed: {seen}"),
    }
}

/// Finds the class row that stands for "no class": it denoises to the mean over the classes.
fn null_classes(
    net: &mut Subject,
    base: &TeacherCard,
    h: &Hypothesis,
    s: &Score,
    classes: usize,
    findings: &mut Findings,
) -> Result<()> {
    let len = net.elements();
    // So much noise that a sample's class no longer shows in it, only the one that the network is told; the larger the
    // sample, the more that takes.
    let sigma = (0.5 * (len as f64).sqrt()).max(10.0).min(h.conversion.schedule().sigma_max());
    let rows = (s.samples.len() / len.max(1)).min(8);
    let e = batch_noise(2000, 0, rows, len);
    let x: Vec<f64> =
        s.samples[..rows * len].iter().zip(&e).map(|(x0, e)| f64::from(*x0) + sigma * f64::from(*e)).collect();
    // With several class conditions a row of one cannot be told from that of another.
    let labelled: Vec<(&String, &Condition)> = base.conditions.iter().filter(|(_, c)| c.classes().is_some()).collect();
    let [(name, condition)] = labelled.as_slice() else { return Ok(()) };
    let mut of = |feed: Feed| denoise(net, h, &x, sigma, sigma, 1.0, &vec![feed; rows]);
    let (candidate, ordinary) = match condition {
        Condition::ClassIndex { .. } => (Feed::Class(classes - 1), classes.saturating_sub(1)),
        _ => (Feed::Zeros, classes),
    };
    if ordinary < 3 {
        return Ok(());
    }
    let picked: Vec<usize> = (0..ordinary.min(24)).map(|i| i * ordinary / ordinary.min(24)).collect();
    let outputs = picked.iter().map(|k| of(Feed::Class(*k))).collect::<Result<Vec<_>>>()?;
    let candidate = of(candidate)?;
    let count = outputs.len() as f64;
    let sum: Vec<f64> = (0..x.len()).map(|i| outputs.iter().map(|o| o[i]).sum()).collect();
    let distance = |o: &[f64], mean: &dyn Fn(usize) -> f64| -> f64 {
        o.iter().enumerate().map(|(i, v)| (v - mean(i)).powi(2)).sum::<f64>() / o.len() as f64
    };
    let mut apart: Vec<f64> = outputs.iter().map(|o| distance(o, &|i| (sum[i] - o[i]) / (count - 1.0))).collect();
    apart.sort_by(f64::total_cmp);
    let typical = apart[apart.len() / 2];
    let share = distance(&candidate, &|i| sum[i] / count) / typical.max(1e-12);
    let path = |field| ["conditions", name.as_str(), field];
    let is_null = share < NULL_SHARE && typical > 1e-7;
    match condition {
        Condition::ClassIndex { .. } if is_null => {
            let why = format!("row {ordinary} denoises to the mean over the others ({share:.2} of a class's distance)");
            findings.value(&path("classes"), ordinary as i64, How::Measured, why.clone());
            findings.value(&path("null"), ordinary as i64, How::Measured, why);
        }
        Condition::ClassIndex { .. } => {
            let why =
                format!("the last of the table's rows is as far from the mean as others ({share:.2}): no null class");
            findings.value(&path("classes"), classes as i64, How::Measured, why);
        }
        _ if is_null => {
            let why = format!("all zeros denoise to the mean over the classes ({share:.2} of a class's distance)");
            findings.value(&path("null"), "zeros", How::Measured, why);
        }
        _ => {}
    }
    Ok(())
}
