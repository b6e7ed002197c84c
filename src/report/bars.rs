//! Pairs of bars by group, as inline SVG: what a figure was when a node was entered and when it was left.

use std::fmt::Write as _;

/// One group of bars.
pub struct Group {
    pub label: String,
    pub values: Vec<Option<f64>>,
}

const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 270.0;
const LEFT: f64 = 58.0;
const BOTTOM: f64 = 42.0;
const COLOURS: [&str; 2] = ["#3b82f6", "#ea8a1e"];

/// Bars of every group beside one another; `names` are the bars of a group. Nothing without a finite value.
pub fn bars(x_label: &str, names: &[&str], groups: &[Group]) -> Option<String> {
    let finite =
        |g: &Group| g.values.iter().flatten().copied().filter(|v| super::plot::drawable(*v)).collect::<Vec<_>>();
    let all: Vec<f64> = groups.iter().flat_map(finite).collect();
    let high = all.iter().copied().reduce(f64::max)?.max(0.0);
    let low = all.iter().copied().reduce(f64::min)?.min(0.0);
    let steps = super::plot::round_steps(low, if high > low { high } else { low + 1.0 }, 4);
    let (low, high) = (steps[0], steps[steps.len() - 1]);
    let span = high - low;
    let (places, top) = super::plot::legend(names);
    let top = f64::from(top + 6);
    let y = |v: f64| top + (HEIGHT - top - BOTTOM) * (high - v) / span;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" font-family=\"sans-serif\" \
         font-size=\"14\" fill=\"currentColor\">\n"
    );
    for v in steps {
        let at = y(v);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"currentColor\" opacity=\"{}\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            if v == 0.0 { 0.5 } else { 0.12 },
            LEFT - 8.0,
            at + 5.0,
            super::plot::tick(v)
        );
    }
    let room = (WIDTH - LEFT) / groups.len().max(1) as f64;
    let bar = (room * 0.7 / names.len().max(1) as f64).min(40.0);
    for (g, group) in groups.iter().enumerate() {
        let middle = LEFT + room * (g as f64 + 0.5);
        for (k, value) in group.values.iter().enumerate() {
            let Some(v) = value.filter(|v| super::plot::drawable(*v)) else { continue };
            let x = middle + bar * (k as f64 - names.len() as f64 / 2.0);
            let (top, bottom) = (y(v.max(0.0)), y(v.min(0.0)));
            let _ = writeln!(
                svg,
                "<rect x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"><title>{}, {}: {v}</title></rect>",
                x + 1.0,
                bar - 2.0,
                (bottom - top).max(0.5),
                COLOURS[k % COLOURS.len()],
                super::text::esc(&group.label),
                super::text::esc(names[k])
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            HEIGHT - 25.0,
            super::text::esc(&group.label)
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
        (LEFT + WIDTH) / 2.0,
        HEIGHT - 6.0,
        super::text::esc(x_label)
    );
    for (k, (name, (left, top))) in names.iter().zip(places).enumerate() {
        let _ = writeln!(
            svg,
            "<rect x=\"{left}\" y=\"{}\" width=\"14\" height=\"12\" fill=\"{}\"/><text x=\"{}\" y=\"{}\">{}</text>",
            top + 2,
            COLOURS[k % COLOURS.len()],
            left + 20,
            top + 13,
            super::text::esc(name)
        );
    }
    svg.push_str("</svg>");
    Some(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_stand_on_zero() {
        let group = |label: &str, a, b| Group { label: label.into(), values: vec![a, b] };
        let svg = bars(
            "node",
            &["entered", "left"],
            &[group("4", Some(2.0), Some(-1.0)), group("<3>", None, Some(f64::NAN))],
        )
        .unwrap();
        // 2 to -1 over 198 pixels: the first bar is two thirds of that, the second one third below it.
        assert!(svg.contains("height=\"132.0\"") && svg.contains("height=\"66.0\""), "{svg}");
        assert!(svg.contains("&lt;3&gt;") && svg.contains("entered") && svg.matches("<rect").count() == 4);
        assert!(bars("node", &["a"], &[group("x", None, None)]).is_none());
    }
}
