//! The size/quality curve as an SVG picture.

use anyhow::{Result, anyhow};
use plotters::coord::ranged1d::{KeyPointHint, Ranged};
use plotters::prelude::*;

/// One curve: a stack at several sizes.
pub(crate) struct Curve {
    /// What the legend calls it.
    pub(crate) name: String,
    /// (resident megabytes, value), by size.
    pub(crate) points: Vec<(f64, f64)>,
}

/// One picture with a linear size axis and a logarithmic quality axis.
pub(crate) struct Panel<'a> {
    pub(crate) title: &'a str,
    pub(crate) y_label: &'a str,
    pub(crate) curves: Vec<Curve>,
    /// A value to draw as a dashed line, such as the uncompressed model's perplexity.
    pub(crate) baseline: Option<(String, f64)>,
}

const COLOURS: [RGBColor; 5] = [
    RGBColor(31, 94, 168),
    RGBColor(214, 96, 28),
    RGBColor(43, 140, 92),
    RGBColor(138, 66, 158),
    RGBColor(120, 120, 120),
];

/// Draws the panels below each other and returns the SVG text.
pub(crate) fn svg(panels: &[Panel<'_>]) -> Result<String> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (760, 380 * panels.len() as u32)).into_drawing_area();
        root.fill(&WHITE).map_err(drawing)?;
        for (area, panel) in root.split_evenly((panels.len(), 1)).iter().zip(panels) {
            draw(area, panel)?;
        }
        root.present().map_err(drawing)?;
    }
    Ok(text)
}

fn drawing(e: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("the picture could not be drawn: {e}")
}

fn draw(area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>, panel: &Panel<'_>) -> Result<()> {
    let points = || panel.curves.iter().flat_map(|c| c.points.iter().copied());
    let values = || points().map(|p| p.1).chain(panel.baseline.iter().map(|b| b.1));
    let (x0, x1) = span(points().map(|p| p.0));
    let (y0, y1) = span(values().filter(|y| *y > 0.0).map(f64::ln));
    let (dx, dy) = ((x1 - x0) * 0.05, (y1 - y0) * 0.08);
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(x0 - dx..x1 + dx, LogAxis { from: y0 - dy, to: y1 + dy })
        .map_err(drawing)?;
    chart
        .configure_mesh()
        .x_desc("resident weights, MB")
        .y_desc(panel.y_label)
        .y_label_formatter(&|y| tick(y.exp()))
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .axis_desc_style(("sans-serif", 14))
        .label_style(("sans-serif", 12))
        .draw()
        .map_err(drawing)?;
    if let Some((name, y)) = &panel.baseline {
        let line = [(x0 - dx, y.ln()), (x1 + dx, y.ln())];
        chart
            .draw_series(DashedLineSeries::new(line, 6, 4, BLACK.mix(0.6).stroke_width(1)))
            .map_err(drawing)?
            .label(name)
            .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], BLACK.mix(0.6)));
    }
    for (curve, colour) in panel.curves.iter().zip(COLOURS.iter().cycle()) {
        let drawn: Vec<(f64, f64)> = curve.points.iter().filter(|p| p.1 > 0.0).map(|p| (p.0, p.1.ln())).collect();
        chart
            .draw_series(LineSeries::new(drawn.iter().copied(), colour.stroke_width(2)))
            .map_err(drawing)?
            .label(&curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        chart.draw_series(drawn.iter().map(|p| Circle::new(*p, 3, colour.filled()))).map_err(drawing)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.2))
        .label_font(("sans-serif", 13))
        .draw()
        .map_err(drawing)
}

/// The smallest interval around the values, never empty.
fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if !low.is_finite() || !high.is_finite() {
        return (0.0, 1.0);
    }
    // A curve of one point still needs an axis with some length.
    let least = (low.abs() * 0.05).max(1e-3);
    if high - low < least { (low - least, high + least) } else { (low, high) }
}

fn tick(y: f64) -> String {
    if y >= 100.0 {
        format!("{y:.0}")
    } else if y >= 1.0 {
        // Perplexities: 18.9, but 20 and not 20.0.
        format!("{y:.1}").trim_end_matches(".0").to_owned()
    } else {
        format!("{y:.6}").trim_end_matches('0').to_owned()
    }
}

/// An axis of logarithms whose ticks are round numbers: 1, 2, 5 times powers of ten, or evenly spaced where few of those fall in.
struct LogAxis {
    from: f64,
    to: f64,
}

impl Ranged for LogAxis {
    type FormatOption = plotters::coord::ranged1d::DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (low, high): (i32, i32)) -> i32 {
        low + ((value - self.from) / (self.to - self.from) * f64::from(high - low)) as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        let (low, high) = (self.from.exp(), self.to.exp());
        let decades = (low.log10().floor() as i32)..=(high.log10().ceil() as i32);
        let ticks: Vec<f64> = decades
            .flat_map(|d| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(d)))
            .filter(|t| (low..=high).contains(t))
            .map(f64::ln)
            .collect();
        if ticks.len() >= 3 {
            return ticks;
        }
        // A narrow range: linear ticks on a round step.
        let rough = (high - low) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        let first = (low / step).ceil() as i64;
        (first..).map(|i| i as f64 * step).take_while(|t| *t <= high).map(f64::ln).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.from..self.to
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_its_labels_and_one_mark_per_point() {
        let curves = vec![Curve { name: "small & odd".into(), points: vec![(1.0, 50.0), (2.0, 20.0), (3.0, 19.0)] }];
        let panel = Panel { title: "T", y_label: "perplexity", curves, baseline: Some(("original".into(), 18.9)) };
        let text = svg(&[panel]).unwrap();
        assert!(text.starts_with("<svg") && text.contains("perplexity") && text.contains("small &amp; odd"));
        assert_eq!(text.matches("<circle").count(), 3);
    }

    #[test]
    fn degenerate_curves_still_draw() {
        for points in [vec![], vec![(1.0, 5.0)], vec![(1.0, 5.0), (1.0, 5.0)], vec![(1.0, 0.0)]] {
            let curves = vec![Curve { name: "c".into(), points }];
            svg(&[Panel { title: "T", y_label: "y", curves, baseline: None }]).unwrap();
        }
    }
}
