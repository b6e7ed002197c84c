//! The plots of the report.

use std::fmt::Write as _;

use serde_json::Value;

use super::bars::{Group, bars};
use super::plot::{Mark, Series, curves};
use super::run::Run;
use super::text::esc;
use crate::eval::in_loop::InLoopPoint;
use crate::shown::counted;

fn plot(svg: Option<String>, title: &str) -> String {
    svg.map_or(String::new(), |svg| {
        format!("<figure class=\"plot\">{svg}<figcaption>{}</figcaption></figure>\n", esc(title))
    })
}

fn grid(plots: String) -> String {
    if plots.is_empty() { plots } else { format!("<div class=\"plots\">{plots}</div>\n") }
}

/// Losses, norms and pace of both stages.
pub fn losses(run: &Run) -> String {
    let marks: Vec<Mark> = run.switches().into_iter().map(|(x, node)| Mark { x, label: node.to_string() }).collect();
    let mut out = String::new();
    let mut add = |title: &str, stage: &str, columns: &[(&str, &str)], marks: &[Mark]| {
        let series: Vec<Series> =
            columns.iter().map(|(c, n)| Series { name: n.to_string(), points: run.column(stage, c) }).collect();
        let _ = write!(out, "{}", plot(curves("iteration", &series, marks), title));
    };
    let moved = if marks.is_empty() { "" } else { "; upright lines: the target moves to that node" };
    let stage2 = |what: &str| format!("Stage 2: {what}{moved}");
    let losses = [("loss_fake", "fake score"), ("loss_generator", "generator")];
    add("Stage 1, degradation: losses", "degrade", &losses, &[]);
    add(&stage2("loss of the fake score"), "backtrack", &losses[..1], &marks);
    add(&stage2("loss of the generator"), "backtrack", &losses[1..], &marks);
    let adversarial = [("loss_gan", "generator"), ("loss_discriminator", "discriminator")];
    add(&stage2("adversarial losses, weighted"), "backtrack", &adversarial, &marks);
    add(&stage2("score mismatch to the current target"), "backtrack", &[("mismatch", "mismatch")], &marks);
    let title = "how far the fake score has come from the target to the score of the student's samples (1: it follows)";
    add(&stage2(title), "backtrack", &[("tracking", "tracking")], &marks);
    add(&stage2("gradient norm of the fake score"), "backtrack", &[("grad_norm_fake", "fake score")], &marks);
    add(&stage2("gradient norm of the generator"), "backtrack", &[("grad_norm_generator", "generator")], &marks);
    add(&stage2("images a second"), "backtrack", &[("images_per_s", "images/s")], &marks);
    grid(out)
}

/// The mismatch to each node when the generator came to it and when it left: the mean over the first and the last quarter of
/// the rows.
pub fn mismatch(run: &Run) -> String {
    let mut groups: Vec<(u64, Vec<f64>)> = Vec::new();
    for row in run.stage("backtrack") {
        let (Some(node), Some(v)) = (row["node"].as_u64(), row["mismatch"].as_f64()) else { continue };
        match groups.last_mut() {
            Some((last, values)) if *last == node => values.push(v),
            _ => groups.push((node, vec![v])),
        }
    }
    let mean = |v: &[f64]| Some(v.iter().sum::<f64>() / v.len() as f64).filter(|_| !v.is_empty());
    let groups: Vec<Group> = groups
        .iter()
        .map(|(node, values)| {
            let part = values.len().div_ceil(4);
            let ends = vec![mean(&values[..part]), mean(&values[values.len() - part..])];
            Group { label: node.to_string(), values: ends }
        })
        .collect();
    grid(plot(
        bars("target node, 0: the teacher", &["on arrival", "on leaving"], &groups),
        "Score mismatch between the student and each node of the trajectory, in the order the student takes them",
    ))
}

/// Denoising losses on the student's samples by noise level, of the first and the newest look.
pub fn levels(run: &Run) -> String {
    let rows: Vec<_> = run.levels.iter().filter(|r| r["stage"] == "backtrack").collect();
    let (Some(first), Some(last)) = (rows.first(), rows.last()) else { return String::new() };
    let mut series = Vec::new();
    let looks = if rows.len() > 1 { vec![("first", first), ("last", last)] } else { vec![("last", last)] };
    for (when, row) in looks {
        for (key, name) in [("target", "target"), ("fake", "fake score")] {
            let pairs = row["sigmas"].as_array().into_iter().flatten().zip(row[key].as_array().into_iter().flatten());
            let points = pairs.filter_map(|(s, v)| Some((s.as_f64().filter(|s| *s > 0.0)?.log10(), v.as_f64()?)));
            series.push(Series { name: format!("{name}, {when}"), points: points.collect() });
        }
    }
    let all = plot(
        curves("log10 of the noise level", &series, &[]),
        "Denoising loss on the student's samples by noise level, at the first and the newest look: where target and fake score part, \
         the student still has to move",
    );
    let by_node = excess_by_node(&rows);
    grid(all + &by_node)
}

/// What the target's loss is above the fake score's when the generator comes to each node: the mismatch, by noise level.
fn excess_by_node(rows: &[&Value]) -> String {
    let mut series: Vec<(u64, Series)> = Vec::new();
    for row in rows {
        let Some(node) = row["node"].as_u64().filter(|n| !series.iter().any(|(m, _)| m == n)) else { continue };
        let values =
            |key: &str| row[key].as_array().into_iter().flatten().filter_map(Value::as_f64).collect::<Vec<_>>();
        let (sigmas, target, fake) = (values("sigmas"), values("target"), values("fake"));
        let points: Vec<(f64, f64)> = sigmas
            .iter()
            .zip(target.iter().zip(&fake))
            .filter(|(s, _)| **s > 0.0)
            .map(|(s, (target, fake))| (s.log10(), target - fake))
            .collect();
        if !points.is_empty() {
            series.push((node, Series { name: format!("node {node}"), points }));
        }
    }
    if series.len() < 2 {
        return String::new();
    }
    let series: Vec<Series> = series.into_iter().map(|(_, s)| s).collect();
    plot(
        curves("log10 of the noise level", &series, &[]),
        "Target's loss above the fake score's when the generator came to each node: what it had to learn there, by noise level",
    )
}

/// Frechet distances of the students kept on the way, `snapshots/update-<k>-<kind>.onnx`, as `disback evaluate --run` measured
/// them, and of the teachers beside them.
pub fn students(run: &Run) -> String {
    let Some(book) = &run.evaluation else { return String::new() };
    let here = book["entries"].as_array().into_iter().flatten().filter(|e| e["setting"] == book["setting"]);
    let mut kinds: Vec<Series> = Vec::new();
    for entry in here {
        let file = entry["file"].as_str().unwrap_or_default();
        let name = file.strip_prefix("snapshots/update-").and_then(|f| f.strip_suffix(".onnx")?.split_once('-'));
        let Some((update, kind)) = name else { continue };
        let (Ok(update), Some(distance)) = (update.parse::<f64>(), entry["row"]["frechet"].as_f64()) else { continue };
        match kinds.iter_mut().find(|s| s.name == kind) {
            Some(series) => series.points.push((update, distance)),
            None => kinds.push(Series { name: kind.to_string(), points: vec![(update, distance)] }),
        }
    }
    kinds.iter_mut().for_each(|s| s.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    let all = || kinds.iter().flat_map(|s| &s.points).map(|p| p.0);
    let (first, last) = (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
    if last > first {
        let teachers = book["others"].as_array().into_iter().flatten().filter(|r| r["kind"] == "teacher");
        let best = teachers.filter_map(|r| r["frechet"].as_f64()).reduce(f64::min);
        kinds.extend(best.map(|d| Series { name: "teacher".into(), points: vec![(first, d), (last, d)] }));
    }
    grid(plot(
        curves("generator updates", &kinds, &[]),
        "Fréchet distance of the students kept on the way: as trained, and averaged",
    ))
}

/// Distances of this run and of others over updates, forward passes and seconds.
pub fn distances(run: &Run, others: &[(String, Vec<InLoopPoint>)]) -> String {
    let nodes = run.nodes.len().saturating_sub(1);
    let own =
        if nodes > 0 { format!("with {}", counted(nodes as u64, "node")) } else { "without trajectory".to_string() };
    let mut all: Vec<(&str, &[InLoopPoint])> = vec![(&own, &run.points)];
    all.extend(others.iter().map(|(name, points)| (name.as_str(), points.as_slice())));
    let frechet = run.points.iter().any(|p| p.frechet.is_some());
    let what = if frechet { "Fréchet distance" } else { "sliced Wasserstein distance" };
    let samples = run.points.last().map_or(0, |p| p.samples);
    type Axis = (&'static str, fn(&InLoopPoint) -> f64);
    let axes: [Axis; 3] = [
        ("generator updates", |p| p.at.update as f64),
        ("forward passes (images), stage 1 included", |p| p.at.passes as f64),
        ("seconds, stage 1 included", |p| p.at.seconds),
    ];
    let mut out = String::new();
    for (name, x) in axes {
        let series: Vec<Series> = all
            .iter()
            .map(|(who, points)| Series {
                name: who.to_string(),
                points: points.iter().map(|p| (x(p), p.figure())).collect(),
            })
            .collect();
        out += &plot(curves(name, &series, &[]), &format!("{what} of {samples} images, over {name}"));
    }
    grid(out)
}
