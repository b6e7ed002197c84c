//! The plots of the report.

use std::fmt::Write as _;

use super::bars::{Group, bars};
use super::html::esc;
use super::plot::{Mark, Series, curves};
use super::run::Run;
use crate::eval::in_loop::Point;

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
    let marks: Vec<Mark> =
        run.switches().into_iter().map(|(x, node)| Mark { x, label: format!("node {node}") }).collect();
    let mut out = String::new();
    let mut add = |title: &str, stage: &str, columns: &[(&str, &str)], marks: &[Mark]| {
        let series: Vec<Series> =
            columns.iter().map(|(c, n)| Series { name: n.to_string(), points: run.column(stage, c) }).collect();
        let _ = write!(out, "{}", plot(curves("iteration", &series, marks), title));
    };
    let losses = [("loss_fake", "fake score"), ("loss_generator", "generator")];
    add("Stage 1, degradation: losses", "degrade", &losses, &[]);
    add("Stage 2: loss of the fake score", "backtrack", &losses[..1], &marks);
    add("Stage 2: loss of the generator", "backtrack", &losses[1..], &marks);
    add("Stage 2: score mismatch to the current target", "backtrack", &[("mismatch", "mismatch")], &marks);
    add("Stage 2: gradient norm of the fake score", "backtrack", &[("grad_norm_fake", "fake score")], &marks);
    add("Stage 2: gradient norm of the generator", "backtrack", &[("grad_norm_generator", "generator")], &marks);
    add("Stage 2: images a second", "backtrack", &[("images_per_s", "images/s")], &marks);
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
        bars(&["entered", "left"], &groups),
        "Score mismatch to each node of the trajectory, in the order the generator takes; 0 is the teacher",
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
    grid(plot(
        curves("log10 of the noise level", &series, &[]),
        "Denoising loss on the student's samples by noise level: where target and fake score part, the student still has to move",
    ))
}

/// Distances of this run and of others over updates, forward passes and seconds.
pub fn distances(run: &Run, others: &[(String, Vec<Point>)]) -> String {
    let nodes = run.nodes.len().saturating_sub(1);
    let own = if nodes > 0 { format!("with {nodes} nodes") } else { "without trajectory".to_string() };
    let mut all: Vec<(&str, &[Point])> = vec![(&own, &run.points)];
    all.extend(others.iter().map(|(name, points)| (name.as_str(), points.as_slice())));
    let frechet = run.points.iter().any(|p| p.frechet.is_some());
    let what = if frechet { "Fréchet distance" } else { "sliced Wasserstein distance" };
    let samples = run.points.last().map_or(0, |p| p.samples);
    type Axis = (&'static str, fn(&Point) -> f64);
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
        out += &plot(curves(name, &series, &[]), &format!("{what} of {samples} images while training, over {name}"));
    }
    grid(out)
}
