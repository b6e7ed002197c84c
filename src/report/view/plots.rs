//! Sequences, sound, vectors and clouds of points as plots.

use ndarray::{ArrayView1, ArrayView2, ArrayView3, Axis, s};

use super::panels::{Content, Panel, png};
use crate::error::Result;

/// Samples side by side, and channels below one another, that are shown of a set.
const ACROSS: usize = 4;
const DOWN: usize = 8;
/// Bars of a histogram.
const BINS: usize = 24;
/// Points of a cloud; of more, a choice of equal steps.
const POINTS: usize = 2000;
/// Steps of a curve that are drawn one by one; of more, the lowest and highest of as many pieces.
const STEPS: usize = 480;

fn finite(values: impl Iterator<Item = f32>) -> impl Iterator<Item = f64> {
    values.map(f64::from).filter(|v| v.is_finite())
}

/// Lowest and highest value with a margin; 0 and 1 where there is none.
fn span(values: impl Iterator<Item = f32>) -> (f64, f64) {
    let (low, high) = finite(values).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    if low > high {
        return (0.0, 1.0);
    }
    let margin = (0.05 * (high - low)).max(1e-3 * high.abs().max(low.abs())).max(1e-9);
    (low - margin, high + margin)
}

/// A curve of values over `x = step * unit`; what is not finite is left out.
fn curve(values: ArrayView1<'_, f32>, unit: f64) -> Vec<(f64, f64)> {
    let all: Vec<(f64, f64)> = values
        .iter()
        .enumerate()
        .map(|(k, v)| (k as f64 * unit, f64::from(*v)))
        .filter(|(_, v)| v.is_finite())
        .collect();
    if all.len() <= STEPS {
        return all;
    }
    let extremes = |piece: &[(f64, f64)]| {
        let by = |a: &(f64, f64), b: &(f64, f64)| a.1.total_cmp(&b.1);
        let (low, high) = (piece.iter().copied().min_by(by), piece.iter().copied().max_by(by));
        let mut both: Vec<(f64, f64)> = low.into_iter().chain(high).collect();
        both.sort_by(|a, b| a.0.total_cmp(&b.0));
        both
    };
    all.chunks(all.len().div_ceil(STEPS / 2)).flat_map(extremes).collect()
}

/// What is shown: samples `[N, C, ...]`, and what lies beneath them.
pub(super) struct Sets<'a> {
    /// Names of both, where there are two.
    pub legend: &'a [&'a str],
    pub own: ArrayView3<'a, f32>,
    pub under: Option<ArrayView3<'a, f32>>,
}

/// Samples `[N, C, L]` as curves, a row a channel and a column a sample; `unit` is what a step means on the x axis.
pub(super) fn lines(
    Sets { legend, own: samples, under }: &Sets<'_>,
    unit: f64,
    columns: Option<usize>,
) -> Result<Vec<u8>> {
    let (n, channels, length) = samples.dim();
    let columns = columns.unwrap_or(ACROSS).clamp(1, n);
    let mut panels = Vec::new();
    for channel in 0..channels.min(DOWN) {
        let of = |set: &ArrayView3<'_, f32>| set.slice(s![..columns.min(set.dim().0), channel, ..]).to_owned();
        let (own, other) = (of(samples), under.as_ref().map(of));
        let y = span(own.iter().chain(other.iter().flatten()).copied());
        for k in 0..columns {
            let mut parts = Vec::new();
            if let Some(other) = other.as_ref().filter(|o| k < o.nrows()) {
                parts.push((1, curve(other.row(k), unit)));
            }
            parts.push((0, curve(own.row(k), unit)));
            let more = if channel + 1 == DOWN && channels > DOWN { format!(" of {channels}") } else { String::new() };
            panels.push(Panel {
                title: format!("sample {k}, channel {channel}{more}"),
                x: (0.0, (length.max(2) - 1) as f64 * unit),
                y,
                content: Content::Lines(parts),
                broken: own.row(k).iter().any(|v| !v.is_finite()),
            });
        }
    }
    png(&panels, columns, legend)
}

/// Shares of the values in each of [`BINS`] bins from low to high.
fn bins(values: impl Iterator<Item = f32>, (low, high): (f64, f64)) -> Vec<f64> {
    let mut counts = [0.0; BINS];
    let mut total = 0.0f64;
    for v in finite(values) {
        let at = ((v - low) / (high - low) * BINS as f64).floor().clamp(0.0, (BINS - 1) as f64) as usize;
        counts[at] += 1.0;
        total += 1.0;
    }
    counts.iter().map(|c| c / total.max(1.0)).collect()
}

/// The histogram of a column of both sets.
fn histogram(title: String, own: ArrayView1<'_, f32>, under: Option<ArrayView1<'_, f32>>) -> Panel {
    let x = span(own.iter().chain(under.iter().flatten()).copied());
    let mut parts: Vec<(usize, Vec<f64>)> = under.iter().map(|u| (1, bins(u.iter().copied(), x))).collect();
    parts.push((0, bins(own.iter().copied(), x)));
    let top = parts.iter().flat_map(|(_, h)| h).fold(0.0f64, |m, v| m.max(*v));
    let broken = own.iter().any(|v| !v.is_finite());
    Panel { title, x, y: (0.0, 1.1 * top.max(1e-9)), content: Content::Bars(parts), broken }
}

/// Two columns of both sets against one another.
fn scatter(title: String, own: [ArrayView1<'_, f32>; 2], under: Option<[ArrayView1<'_, f32>; 2]>) -> Panel {
    let along = |k: usize| span(own[k].iter().chain(under.iter().flat_map(|u| &u[k])).copied());
    let points = |[x, y]: &[ArrayView1<'_, f32>; 2]| -> Vec<(f64, f64)> {
        let every = x.len().div_ceil(POINTS).max(1);
        let all = x.iter().zip(y).step_by(every).map(|(x, y)| (f64::from(*x), f64::from(*y)));
        all.filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
    };
    let mut clouds: Vec<(usize, Vec<(f64, f64)>)> = under.iter().map(|u| (1, points(u))).collect();
    clouds.push((0, points(&own)));
    let broken = own.iter().flat_map(|c| c.iter()).any(|v| !v.is_finite());
    Panel { title, x: along(0), y: along(1), content: Content::Dots(clouds), broken }
}

/// Rows `[N, 1, D]`: each of the leading dimensions as a histogram, and pairs of the first four as clouds.
pub(super) fn vectors(Sets { legend, own, under }: &Sets<'_>) -> Result<Vec<u8>> {
    let samples = own.index_axis(Axis(1), 0);
    let dims = samples.ncols();
    let of = |set: &Option<ArrayView3<'_, f32>>, k: usize| set.as_ref().map(|u| u.slice(s![.., 0, k]).to_owned());
    let mut panels = Vec::new();
    for k in 0..dims.min(2 * ACROSS) {
        let other = of(under, k);
        let more = if k + 1 == 2 * ACROSS && dims > k + 1 { format!(" of {dims}") } else { String::new() };
        panels.push(histogram(format!("value {k}{more}"), samples.column(k), other.as_ref().map(|o| o.view())));
    }
    for b in 1..dims.min(ACROSS) {
        for a in 0..b {
            let other = of(under, a).zip(of(under, b));
            let other = other.as_ref().map(|(x, y)| [x.view(), y.view()]);
            panels.push(scatter(format!("{a} across, {b} up"), [samples.column(a), samples.column(b)], other));
        }
    }
    png(&panels, ACROSS, legend)
}

/// Clouds `[N, C, P]` of `P` points: a row a sample with pairs of its first three coordinates, then the coordinates of all
/// samples as histograms.
pub(super) fn points(Sets { legend, own: samples, under }: &Sets<'_>) -> Result<Vec<u8>> {
    let (n, dims, _) = samples.dim();
    let pairs: &[(usize, usize)] = if dims < 3 { &[(0, 1)] } else { &[(0, 1), (0, 2), (1, 2)] };
    let columns = if dims < 3 { ACROSS } else { 3 };
    let mut panels = Vec::new();
    if dims > 1 {
        for k in 0..n.min(ACROSS) {
            let own = samples.index_axis(Axis(0), k);
            let other = under.as_ref().filter(|u| k < u.dim().0).map(|u| u.index_axis(Axis(0), k));
            for &(a, b) in pairs {
                let both = |set: &ArrayView2<'_, f32>| [set.row(a).to_owned(), set.row(b).to_owned()];
                let (mine, theirs) = (both(&own), other.as_ref().map(both));
                let theirs = theirs.as_ref().map(|[x, y]| [x.view(), y.view()]);
                let title = format!("sample {k}: {a} across, {b} up");
                panels.push(scatter(title, [mine[0].view(), mine[1].view()], theirs));
            }
        }
    }
    for d in 0..dims.min(3) {
        let all =
            |set: &ArrayView3<'_, f32>| set.index_axis(Axis(1), d).iter().copied().collect::<ndarray::Array1<f32>>();
        let (own, other) = (all(samples), under.as_ref().map(all));
        panels.push(histogram(format!("coordinate {d}, all samples"), own.view(), other.as_ref().map(|o| o.view())));
    }
    png(&panels, columns, legend)
}
