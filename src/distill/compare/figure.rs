//! The comparison as a drawing: means over seeds as lines, one standard deviation as bands.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Curve, Point};
use crate::report::plot::drawable;

/// What the distance is drawn over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Generator updates.
    Updates,
    /// Forward passes of all networks in images, stage 1 included.
    Forwards,
    /// Seconds of training, stage 1 included.
    Seconds,
}

impl Axis {
    /// The value of a measurement on this axis.
    pub fn of(self, p: &Point) -> f64 {
        match self {
            Self::Updates => p.updates as f64,
            Self::Forwards => p.forwards as f64,
            Self::Seconds => p.seconds,
        }
    }
    fn label(self) -> &'static str {
        match self {
            Self::Updates => "generator updates",
            Self::Forwards => "forward passes (images), stage 1 included",
            Self::Seconds => "seconds, stage 1 included",
        }
    }
}

const PANEL: (u32, u32) = (520, 400);
const BASE: RGBColor = RGBColor(90, 90, 90);
const TRAJECTORY: RGBColor = RGBColor(210, 90, 20);

/// Mean x, mean y and standard deviation of y of every look over the seeds.
fn band(curves: &[Curve], axis: Axis) -> Vec<(f64, f64, f64)> {
    let looks = curves.iter().map(|c| c.points.len()).min().unwrap_or(0);
    let n = curves.len() as f64;
    (0..looks)
        .map(|k| {
            let mean = |f: &dyn Fn(&Point) -> f64| curves.iter().map(|c| f(&c.points[k])).sum::<f64>() / n;
            let (x, y) = (mean(&|p| axis.of(p)), mean(&|p| p.distance));
            let variance = mean(&|p| (p.distance - y).powi(2)) * n / (n - 1.0).max(1.0);
            (x, y, variance.sqrt())
        })
        .collect()
}

/// One comparison to draw.
#[derive(Debug, Clone, Copy)]
pub struct Group<'a> {
    /// Title of the row of panels; shown where there is more than one row.
    pub title: &'a str,
    /// Runs of the base method, one a seed.
    pub base: &'a [Curve],
    /// Runs with the trajectory, one a seed.
    pub trajectory: &'a [Curve],
}

/// A row of three panels for each comparison: distance (logarithmic) over updates, forward passes and seconds. A thin line
/// marks the distance that the base method ends with.
pub fn svg(title: &str, groups: &[Group]) -> Option<String> {
    let mut out = String::new();
    draw(&mut out, title, groups).ok()?;
    Some(out)
}

/// Height of the title line above the panels.
const HEAD: u32 = 40;

fn draw(out: &mut String, title: &str, groups: &[Group]) -> Result<(), Box<dyn std::error::Error>> {
    let size = (3 * PANEL.0, PANEL.1 * groups.len() as u32 + HEAD);
    let root = SVGBackend::with_string(out, size).into_drawing_area();
    root.fill(&WHITE)?;
    let text = |size: i32| ("sans-serif", size).into_font().color(&BLACK).pos(Pos::new(HPos::Left, VPos::Top));
    root.draw(&Text::new(title.to_owned(), (20, 10), text(20)))?;
    for (k, (name, colour)) in [("base method", BASE), ("with the trajectory", TRAJECTORY)].into_iter().enumerate() {
        let left = size.0 as i32 - 420 + 190 * k as i32;
        root.draw(&PathElement::new(vec![(left, 20), (left + 24, 20)], colour.stroke_width(4)))?;
        root.draw(&Text::new(name, (left + 30, 11), text(17)))?;
    }
    let rows = root.margin(HEAD, 0, 0, 0).split_evenly((groups.len(), 1));
    for (row, group) in rows.iter().zip(groups) {
        let Group { base, trajectory, .. } = *group;
        let all = || {
            base.iter()
                .chain(trajectory)
                .flat_map(|c| &c.points)
                .map(|p| p.distance)
                .filter(|d| *d > 0.0 && drawable(*d))
        };
        let (low, high) = all().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), d| (l.min(d), h.max(d)));
        let (low, high) = if low < high { (low * 0.9, high * 1.1) } else { (0.5, 2.0) };
        let goal = base.iter().filter(|c| !c.points.is_empty()).map(|c| super::statistics::level(&c.points));
        let goal = goal.clone().sum::<f64>() / (goal.count() as f64).max(1.0);
        for (area, axis) in row.split_evenly((1, 3)).iter().zip([Axis::Updates, Axis::Forwards, Axis::Seconds]) {
            let bands = [(band(base, axis), BASE), (band(trajectory, axis), TRAJECTORY)];
            let right =
                bands.iter().flat_map(|(b, _)| b).map(|p| p.0).filter(|x| drawable(*x)).fold(0.0, f64::max).max(1e-9);
            let mut builder = ChartBuilder::on(area);
            builder.margin(12).x_label_area_size(44).y_label_area_size(60);
            if axis == Axis::Updates && groups.len() > 1 {
                builder.caption(group.title, ("sans-serif", 17));
            } else if groups.len() > 1 {
                builder.caption(" ", ("sans-serif", 17));
            }
            let mut chart = builder.build_cartesian_2d(0.0..right, (low..high).log_scale())?;
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .bold_line_style(BLACK.mix(0.12))
                .x_labels(5)
                .y_labels(10)
                .label_style(("sans-serif", 15))
                .x_label_formatter(&|v| if *v >= 1e5 { format!("{:.1}M", v / 1e6) } else { format!("{v:.0}") })
                .y_label_formatter(&|v| if *v >= 10.0 { format!("{v:.0}") } else { format!("{v:.1}") })
                .x_desc(axis.label())
                .y_desc("distance")
                .axis_desc_style(("sans-serif", 16))
                .draw()?;
            let clip = |y: f64| y.clamp(low, high);
            chart.draw_series(LineSeries::new([(0.0, clip(goal)), (right, clip(goal))], BASE.mix(0.6)))?;
            for (points, colour) in &bands {
                let upper = points.iter().map(|&(x, y, sd)| (x, clip(y + sd)));
                let lower = points.iter().rev().map(|&(x, y, sd)| (x, clip(y - sd)));
                let outline = upper.chain(lower).collect::<Vec<_>>();
                chart.draw_series(std::iter::once(Polygon::new(outline, colour.mix(0.2))))?;
                chart.draw_series(LineSeries::new(points.iter().map(|p| (p.0, clip(p.1))), colour.stroke_width(2)))?;
            }
        }
    }
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bands_are_means_and_deviations_over_seeds() {
        let curve = |seed, d: [f64; 2]| Curve {
            seed,
            nodes: 0,
            points: (0..2)
                .map(|k| Point {
                    updates: 10 * k,
                    forwards: 20 * k,
                    seconds: (seed + k) as f64,
                    distance: d[k as usize],
                })
                .collect(),
        };
        let curves = [curve(0, [4.0, 1.0]), curve(2, [6.0, 3.0])];
        let expected = [(0.0, 5.0, 2f64.sqrt()), (10.0, 2.0, 2f64.sqrt())];
        assert_eq!(band(&curves, Axis::Updates), expected);
        assert_eq!(band(&curves, Axis::Seconds)[1].0, 2.0);
        let group = |title| Group { title, base: &curves, trajectory: &curves };
        let drawn = svg("t", &[group("dmd")]).unwrap();
        assert!(drawn.contains("seconds, stage 1 included") && !drawn.contains("dmd"));
        let two = svg("t", &[group("dmd"), group("sid")]).unwrap();
        assert!(two.contains("dmd") && two.contains("sid"));
        assert_eq!((drawn.matches("<polygon").count(), two.matches("<polygon").count()), (6, 12));
    }
}
