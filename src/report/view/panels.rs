//! A sheet of small plots as one PNG: curves, clouds of points, histograms.

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::canvas::Canvas;
use crate::error::{Error, Result};
use crate::io::images::encode_png;
use crate::report::plot::{COLOURS, axis, tick};

/// Pixels of one panel.
const PANEL: (u32, u32) = (300, 180);
/// Height of the line that says which colour is what.
const LEGEND: u32 = 22;
/// Marks a panel whose values are not all finite.
const BROKEN: RGBColor = RGBColor(255, 0, 255);

/// What a panel shows. The number beside each part is its place in the legend.
pub(super) enum Content {
    /// Curves of (x, y).
    Lines(Vec<(usize, Vec<(f64, f64)>)>),
    /// Clouds of (x, y).
    Dots(Vec<(usize, Vec<(f64, f64)>)>),
    /// Heights of bars of equal width from the panel's left to its right.
    Bars(Vec<(usize, Vec<f64>)>),
}

/// One plot.
pub(super) struct Panel {
    pub title: String,
    pub x: (f64, f64),
    pub y: (f64, f64),
    pub content: Content,
    /// Some of its values are NaN or infinite: they cannot be drawn, but must be seen.
    pub broken: bool,
}

/// Lays panels out in rows of `columns` under a legend and gives the PNG's bytes.
pub(super) fn png(panels: &[Panel], columns: usize, legend: &[&str]) -> Result<Vec<u8>> {
    let columns = columns.clamp(1, panels.len().max(1));
    let rows = panels.len().div_ceil(columns);
    let size = (PANEL.0 * columns as u32, PANEL.1 * rows as u32 + LEGEND);
    let mut pixels = vec![0; 3 * size.0 as usize * size.1 as usize];
    draw(&mut pixels, size, panels, (rows, columns), legend).map_err(|e| Error::io(format!("a plot: {e}")))?;
    // Plane by plane, as images are held here.
    let planes: Vec<u8> = (0..3).flat_map(|c| pixels.iter().skip(c).step_by(3).copied()).collect();
    encode_png(&planes, [3, size.1 as usize, size.0 as usize])
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(
    pixels: &mut [u8],
    size: (u32, u32),
    panels: &[Panel],
    (rows, columns): (usize, usize),
    legend: &[&str],
) -> Drawn {
    let root = Canvas::new(pixels, size).into_drawing_area();
    let (head, body) = root.split_vertically(LEGEND);
    let text = ("sans-serif", 13).into_font().color(&BLACK).pos(Pos::new(HPos::Left, VPos::Center));
    let mut left = 12;
    for (k, name) in legend.iter().enumerate() {
        let (middle, colour) = (LEGEND as i32 / 2, COLOURS[k % COLOURS.len()]);
        head.draw(&Rectangle::new([(left, middle - 4), (left + 14, middle + 4)], colour.filled()))?;
        head.draw(&Text::new((*name).to_string(), (left + 20, middle), text.clone()))?;
        left += 44 + 6 * name.chars().count() as i32;
    }
    for (area, panel) in body.split_evenly((rows, columns)).iter().zip(panels) {
        one(area, panel)?;
    }
    root.present()?;
    Ok(())
}

fn one(area: &DrawingArea<Canvas<'_>, plotters::coord::Shift>, panel: &Panel) -> Drawn {
    let text = || ("sans-serif", 13).into_font().color(&BLACK);
    let (width, _) = area.dim_in_pixel();
    let style = text().pos(Pos::new(HPos::Center, VPos::Top));
    area.draw(&Text::new(panel.title.clone(), (width as i32 / 2, 2), style))?;
    let (x, y) = (axis(panel.x.0, panel.x.1), axis(panel.y.0, panel.y.1));
    let mut chart = ChartBuilder::on(area)
        .margin_top(18)
        .margin_right(12)
        .margin_bottom(4)
        .x_label_area_size(20)
        .y_label_area_size(52)
        .build_cartesian_2d(x.0..x.1, y.0..y.1)?;
    if panel.broken {
        chart.plotting_area().fill(&BROKEN.mix(0.3))?;
    }
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.1))
        .axis_style(BLACK.mix(0.5))
        .x_labels(5)
        .y_labels(4)
        .label_style(text())
        .x_label_formatter(&|v| tick(*v))
        .y_label_formatter(&|v| tick(*v))
        .draw()?;
    fill(&mut chart, panel)
}

type Chart<'a, 'b> = ChartContext<'a, Canvas<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

fn fill(chart: &mut Chart<'_, '_>, panel: &Panel) -> Drawn {
    let colour = |k: &usize| COLOURS[k % COLOURS.len()];
    match &panel.content {
        Content::Lines(lines) => {
            for (k, points) in lines {
                chart.draw_series(LineSeries::new(points.iter().copied(), colour(k).stroke_width(1)))?;
            }
        }
        Content::Dots(clouds) => {
            for (k, points) in clouds {
                let style = colour(k).mix(0.6).filled();
                chart.draw_series(points.iter().map(|&at| Circle::new(at, 2, style)))?;
            }
        }
        Content::Bars(sets) => {
            for (k, heights) in sets {
                let width = (panel.x.1 - panel.x.0) / heights.len().max(1) as f64;
                let style = colour(k).mix(0.45).filled();
                let bars = heights.iter().enumerate().filter(|(_, h)| **h > 0.0).map(|(i, &h)| {
                    let left = panel.x.0 + width * i as f64;
                    Rectangle::new([(left, 0.0), (left + width, h)], style)
                });
                chart.draw_series(bars)?;
            }
        }
    }
    Ok(())
}
