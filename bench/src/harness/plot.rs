//! Plots as SVG: each subject's values as dots, its median as a bar.

use plotters::prelude::*;

use super::Experiment;

const COLOURS: [RGBColor; 4] =
    [RGBColor(31, 119, 180), RGBColor(214, 110, 20), RGBColor(60, 140, 60), RGBColor(130, 90, 160)];

/// Draws `e`; none when it has no values.
pub(super) fn draw(e: &Experiment) -> Result<Option<String>, String> {
    let series: Vec<_> = e.series.iter().filter(|s| !s.values.is_empty()).collect();
    let top = series
        .iter()
        .flat_map(|s| s.values.iter().chain(s.target.as_ref()))
        .copied()
        .fold(0.0, f64::max);
    if series.is_empty() {
        return Ok(None);
    }
    let top = if top > 0.0 { top * 1.12 } else { 1.0 };
    let mut svg = String::new();
    render(e, &series, top, &mut svg).map_err(|e| e.to_string())?;
    Ok(Some(svg))
}

fn render(
    e: &Experiment,
    series: &[&super::Series],
    top: f64,
    svg: &mut String,
) -> Result<(), Box<dyn std::error::Error>> {
    let rows = series.len();
    let height = 110 + 56 * u32::try_from(rows)?;
    let root = SVGBackend::with_string(svg, (760, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("{} ({})", e.name, e.unit), ("sans-serif", 20))
        .margin(14)
        .x_label_area_size(34)
        .y_label_area_size(130)
        .build_cartesian_2d(0.0..top, -0.5..rows as f64 - 0.5)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_labels(8)
        .x_max_light_lines(1)
        .y_labels(2 * rows + 1)
        .label_style(("sans-serif", 15))
        .y_label_formatter(&|y| {
            let near = y.round();
            let row = rows as f64 - 1.0 - near;
            if (y - near).abs() < 0.01 && (0.0..rows as f64).contains(&row) {
                series[row as usize].subject.clone()
            } else {
                String::new()
            }
        })
        .x_desc(e.unit.as_str())
        .draw()?;
    for (i, s) in series.iter().enumerate() {
        let y = (rows - 1 - i) as f64;
        let colour = COLOURS[i % COLOURS.len()];
        if let Some(sum) = s.summary {
            chart.draw_series([Rectangle::new(
                [(0.0, y - 0.28), (sum.median, y + 0.28)],
                colour.mix(0.35).filled(),
            )])?;
            chart.draw_series([PathElement::new([(sum.min, y), (sum.max, y)], colour)])?;
        }
        chart.draw_series(s.values.iter().map(|v| Circle::new((*v, y), 4, colour.filled())))?;
        if let Some(t) = s.target {
            let line = [(t, y - 0.42), (t, y + 0.42)];
            chart.draw_series([PathElement::new(line, RED.stroke_width(2))])?;
        }
    }
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Better;
    use super::*;

    #[test]
    fn a_plot_names_its_subjects_and_an_empty_one_is_none() {
        let mut e = Experiment::new("switch", "request to RESUME", "ms", Better::Lower);
        assert_eq!(draw(&e), Ok(None));
        for v in [610.0, 640.0, 590.0] {
            e.push("godwit", v);
            e.push("stock", v * 9.0);
        }
        e.target("godwit", 700.0);
        e.finish();
        let svg = draw(&e).expect("drawn").expect("has values");
        assert!(
            svg.starts_with("<svg") && svg.contains("godwit") && svg.contains("stock"),
            "{svg}"
        );
    }
}
