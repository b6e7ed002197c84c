//! Curves as inline SVG that follows the page's colours.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// One curve.
#[derive(Debug, Clone)]
pub struct Series {
    /// The curve's name in the legend.
    pub name: String,
    /// (x, y), x ascending. Points that are not finite, or beyond 1e30, are left out.
    pub points: Vec<(f64, f64)>,
}

/// A vertical line with a label: a node switch.
#[derive(Debug, Clone)]
pub struct Mark {
    /// Where the line stands, in the units of the x axis.
    pub x: f64,
    /// The text at the line.
    pub label: String,
}

/// About as large as it is shown, so that its text is as large as the page's.
const SIZE: (u32, u32) = (480, 270);
/// Mid tones that can be told apart on light and on dark ground, also by most colour-blind readers.
pub(super) const COLOURS: [RGBColor; 6] = [
    RGBColor(59, 130, 246),
    RGBColor(234, 138, 30),
    RGBColor(16, 165, 120),
    RGBColor(200, 70, 160),
    RGBColor(125, 125, 135),
    RGBColor(205, 65, 50),
];
/// Stands for the page's text colour until the SVG is written.
const INK: RGBColor = RGBColor(1, 2, 3);
const INK_HEX: &str = "#010203";
/// More points than this are joined by their means.
const MOST: usize = 600;

/// Values beyond this are left out like those that are not finite: a file that says 1e308 is broken, and the steps between an
/// axis' labels are computed with numbers several times as large.
const LARGEST: f64 = 1e30;

/// Whether a value can stand on an axis.
pub(crate) fn drawable(v: f64) -> bool {
    v.abs() <= LARGEST
}

/// The ends of an axis, far enough apart that labels between them are different numbers.
pub(crate) fn axis(low: f64, high: f64) -> (f64, f64) {
    let low = if drawable(low) { low } else { 0.0 };
    let high = if drawable(high) && high >= low { high } else { low };
    let least = (low.abs().max(high.abs()) * 1e-6).max(1e-9);
    if high - low >= least { (low, high) } else { (low, low + least) }
}

fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|(x, y)| drawable(*x) && drawable(*y)).collect();
    if finite.len() <= MOST {
        return finite;
    }
    let size = finite.len().div_ceil(MOST);
    let mean = |c: &[(f64, f64)], f: fn(&(f64, f64)) -> f64| c.iter().map(f).sum::<f64>() / c.len() as f64;
    finite.chunks(size).map(|c| (mean(c, |p| p.0), mean(c, |p| p.1))).collect()
}

/// The range of the middle 98 % of the values, with a margin: a single spike must not flatten a curve.
fn span(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let pick = |share: f64| sorted.get(((sorted.len().max(1) - 1) as f64 * share).round() as usize).copied();
    let (low, high) = (pick(0.01)?, pick(0.99)?);
    let margin = 0.08 * (high - low).max(high.abs().max(low.abs()) * 1e-3).max(1e-9);
    Some((low - margin, high + margin))
}

/// Short numbers for axes: 0.003, 12.5, 40k.
pub(super) fn tick(v: f64) -> String {
    let a = v.abs();
    if v == 0.0 || a < 1e-12 {
        "0".into()
    } else if !(1e-3..1e6).contains(&a) {
        format!("{v:.1e}")
    } else if a >= 1e4 {
        format!("{:.0}k", v / 1e3)
    } else {
        let text = format!(
            "{:.*}",
            if a >= 100.0 {
                0
            } else if a >= 1.0 {
                2
            } else {
                4
            },
            v
        );
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
    }
}

/// Draws curves over a common x axis, with vertical marks. Nothing where no curve has two points.
pub fn curves(x_label: &str, series: &[Series], marks: &[Mark]) -> Option<String> {
    let drawn: Vec<(&str, Vec<(f64, f64)>)> =
        series.iter().map(|s| (s.name.as_str(), thin(&s.points))).filter(|(_, p)| p.len() >= 2).collect();
    let all = || drawn.iter().flat_map(|(_, p)| p.iter());
    let (y0, y1) = span(all().map(|p| p.1))?;
    let x0 = all().map(|p| p.0).fold(f64::INFINITY, f64::min);
    let x1 = all().map(|p| p.0).fold(f64::NEG_INFINITY, f64::max);
    let mut svg = String::new();
    draw(&mut svg, x_label, &drawn, marks, axis(x0, x1), axis(y0, y1)).ok()?;
    Some(svg.replace(INK_HEX, "currentColor"))
}

/// Places (left, top) of the legend's entries, in as many rows as they need, and the height of all rows.
pub(super) fn legend(names: &[&str]) -> (Vec<(i32, i32)>, i32) {
    let (mut places, mut left, mut top) = (Vec::new(), LEFT, 4);
    for name in names {
        let width = 44 + 15 * name.chars().count() as i32 / 2;
        if left > LEFT && left + width > SIZE.0 as i32 {
            (left, top) = (LEFT, top + 20);
        }
        places.push((left, top));
        left += width;
    }
    (places, top + 20)
}

/// Room for the labels of the y axis.
const LEFT: i32 = 58;

/// At most about `count` round numbers that span `low` to `high`.
pub(super) fn round_steps(low: f64, high: f64, count: usize) -> Vec<f64> {
    let rough = (high - low) / count.max(1) as f64;
    if !(rough.is_finite() && rough > 0.0) {
        return vec![low];
    }
    let unit = 10f64.powf(rough.log10().floor());
    let step = unit * [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|m| m * unit >= rough * 0.999).unwrap_or(10.0);
    let (first, last) = ((low / step).floor() as i64, (high / step).ceil() as i64);
    (first..=last).map(|k| k as f64 * step).collect()
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw(
    svg: &mut String,
    x_label: &str,
    series: &[(&str, Vec<(f64, f64)>)],
    marks: &[Mark],
    (x0, x1): (f64, f64),
    (y0, y1): (f64, f64),
) -> Drawn {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    // The backend writes four fifths of the size it is given.
    let text = |size: i32| ("sans-serif", size).into_font().color(&INK);
    let names: Vec<&str> = series.iter().map(|(name, _)| *name).collect();
    let (places, top) = legend(&names);
    let mut chart = ChartBuilder::on(&root)
        .margin_top(top + 4)
        .margin_right(14)
        .x_label_area_size(42)
        .y_label_area_size(LEFT)
        .build_cartesian_2d(x0..x1, y0..y1)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(INK.mix(0.12))
        .axis_style(INK.mix(0.5))
        .x_labels(6)
        .y_labels(5)
        .label_style(text(17))
        .x_label_formatter(&|v| tick(*v))
        .y_label_formatter(&|v| tick(*v))
        .x_desc(x_label)
        .axis_desc_style(text(17))
        .draw()?;
    let mut free = f64::NEG_INFINITY;
    for mark in marks.iter().filter(|m| (x0..=x1).contains(&m.x)) {
        chart.draw_series(std::iter::once(PathElement::new(vec![(mark.x, y0), (mark.x, y1)], INK.mix(0.35))))?;
        // Labels that would run into one another are left out; their lines stay.
        let at = (mark.x - x0) / (x1 - x0) * f64::from(SIZE.0 as i32 - LEFT - 14);
        if at < free {
            continue;
        }
        free = at + 7.0 * (mark.label.chars().count() + 1) as f64;
        let style = text(15).pos(Pos::new(HPos::Left, VPos::Top));
        chart.draw_series(std::iter::once(Text::new(format!(" {}", mark.label), (mark.x, y1), style)))?;
    }
    for (k, (_, points)) in series.iter().enumerate() {
        let colour = COLOURS[k % COLOURS.len()];
        let inside = points.iter().map(|&(x, y)| (x, y.clamp(y0, y1)));
        chart.draw_series(LineSeries::new(inside, colour.stroke_width(2)))?;
    }
    // The legend stands above the plot, where it hides nothing.
    for (k, ((name, _), (left, top))) in series.iter().zip(places).enumerate() {
        let colour = COLOURS[k % COLOURS.len()];
        root.draw(&PathElement::new(vec![(left, top + 8), (left + 18, top + 8)], colour.stroke_width(3)))?;
        root.draw(&Text::new(name.to_string(), (left + 24, top), text(17).pos(Pos::new(HPos::Left, VPos::Top))))?;
    }
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(points: Vec<(f64, f64)>) -> Series {
        Series { name: "loss".into(), points }
    }

    #[test]
    fn a_plot_is_one_svg_with_its_curves_and_marks() {
        let points: Vec<(f64, f64)> = (0..5000).map(|k| (k as f64, 1.0 / (k + 1) as f64)).collect();
        let mark = Mark { x: 2500.0, label: "node 3".into() };
        let svg = curves("iteration", &[series(points)], &[mark]).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("node 3") && svg.contains("loss") && svg.contains("iteration"));
        assert!(svg.contains("currentColor") && !svg.contains(INK_HEX));
        assert!(svg.len() < 60_000, "{}", svg.len());
    }

    #[test]
    fn crowded_labels_give_way() {
        let points = (0..100).map(|k| (k as f64, 0.0)).collect();
        let marks: Vec<Mark> = (0..50).map(|k| Mark { x: 2.0 * k as f64, label: format!("node {k}") }).collect();
        let svg = curves("iteration", &[series(points)], &marks).unwrap();
        let shown = svg.matches("node ").count();
        assert!((5..15).contains(&shown), "{shown}");
    }

    #[test]
    fn a_long_legend_takes_more_rows() {
        let names = ["target, first", "fake score, first", "target, last", "fake score, last"];
        let (places, height) = legend(&names);
        assert!(height > 24, "{places:?}");
        for (k, (name, (left, top))) in names.iter().zip(&places).enumerate() {
            assert!(left + 24 + 7 * name.len() as i32 <= SIZE.0 as i32 && *top < height, "{places:?}");
            let later = &places[k + 1..];
            assert!(later.iter().all(|(l, t)| t > top || (t == top && *l > left + 24 + 6 * name.len() as i32)));
        }
    }

    #[test]
    fn steps_are_round() {
        assert_eq!(round_steps(0.0, 0.2879, 4), [0.0, 0.1, 0.2, 0.30000000000000004]);
        assert_eq!(round_steps(-1.0, 2.0, 4), [-1.0, 0.0, 1.0, 2.0]);
        assert_eq!(round_steps(0.0, 7.0, 4), [0.0, 2.0, 4.0, 6.0, 8.0]);
        assert_eq!(round_steps(3.0, 3.0, 4), [3.0]);
    }

    #[test]
    fn nothing_to_draw_is_no_plot() {
        assert!(curves("x", &[], &[]).is_none());
        assert!(curves("x", &[series(vec![(0.0, f64::NAN), (1.0, 1.0)])], &[]).is_none());
        // A constant curve has no extent of its own.
        assert!(curves("x", &[series(vec![(0.0, 2.0), (1.0, 2.0)])], &[]).is_some());
    }

    /// Labels of an axis are found by a loop that did not end on such values.
    #[test]
    fn values_that_no_axis_can_hold_end_no_plot() {
        for pair in
            [[1e308, -1e308], [1e307, -1e307], [1e308, 0.0], [3e38, -3e38], [1e300, 1e300], [1e18, 1e18], [1e-308, 0.0]]
        {
            for points in [[(1.0, pair[0]), (2.0, pair[1])], [(pair[0], 1.0), (pair[1], 2.0)]] {
                let drawn = points.iter().all(|(x, y)| drawable(*x) && drawable(*y));
                assert_eq!(curves("x", &[series(points.to_vec())], &[]).is_some(), drawn, "{points:?}");
            }
        }
        let nearly = (0..40).map(|k| (k as f64, 0.5 + 1e-17 * k as f64)).collect();
        assert!(curves("x", &[series(nearly)], &[]).is_some());
        let far = (0..40).map(|k| ((k % 2) as f64 * 2f64.powi(63), 1.0)).collect();
        assert!(curves("x", &[series(far)], &[]).is_some());
        assert_eq!(axis(f64::NAN, 1.0), (0.0, 1.0));
        assert_eq!(axis(2.0, f64::INFINITY), (2.0, 2.0 + 2e-6));
    }

    #[test]
    fn ticks_are_short() {
        let cases =
            [(0.0, "0"), (0.0031, "0.0031"), (12.5, "12.5"), (250.0, "250"), (40_000.0, "40k"), (1e-5, "1.0e-5")];
        cases.iter().for_each(|(v, want)| assert_eq!(tick(*v), *want));
    }
}
